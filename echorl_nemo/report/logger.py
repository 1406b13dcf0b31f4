"""The files of a run folder: metrics, rollouts, TensorBoard. Written by one rank."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from echorl_nemo.report.config import FAILURES_FILE, METRICS_FILE, ROLLOUTS_FILE, LoggerConfig
from echorl_nemo.report.trackers import trackers
from echorl_nemo.rollout.batch import RolloutBatch


class RunLogger:
    """Appends to the files of a run folder."""

    def __init__(self, folder: Path, config: LoggerConfig, *, first_step: int) -> None:
        """``first_step``: what an interrupted run wrote of this step and later ones is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config = folder, config
        for name in (METRICS_FILE, ROLLOUTS_FILE, FAILURES_FILE):
            _keep_lines(folder / name, lambda row: row["step"] < first_step)
        self._trackers = trackers(folder, config, first_step=first_step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics after training step ``step`` (from 0; -1 before the first)."""
        _append(self.folder / METRICS_FILE, [{"step": step, **values}])
        for tracker in self._trackers:
            tracker.log(step, {name.replace(".", "/"): value for name, value in values.items()})

    def failures(self, step: int, failures: Iterable[dict[str, str]]) -> None:
        """Verifiers that gave no answer, each with its problem."""
        _append(self.folder / FAILURES_FILE, [{"step": step, **failure} for failure in failures])

    def keeps_rollouts(self, step: int, *, last: bool) -> bool:
        return last or step % self.config.rollouts_every == 0

    def rollouts(
        self, step: int, batch: RolloutBatch, step_ids: Tensor, pieces: Callable[[list[int]], list[str]]
    ) -> None:
        """Keep the rollouts of the first groups."""
        groups = list(dict.fromkeys(batch.group_ids.tolist()))[: self.config.groups]
        rows = [row for row, group in enumerate(batch.group_ids.tolist()) if group in groups]
        _append(self.folder / ROLLOUTS_FILE, [_record(step, batch, row, step_ids, pieces) for row in rows])

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of the run folder; none if the file is not there. A last line that a killed run did
    not finish does not count."""
    if not path.is_file():
        return []
    *lines, unfinished = path.read_text(encoding="utf-8").split("\n")
    if unfinished:
        logging.getLogger(__name__).warning("%s: its last line was not finished and is left out", path)
    return [json.loads(line) for line in lines if line]


def _record(
    step: int, batch: RolloutBatch, row: int, step_ids: Tensor, pieces: Callable[[list[int]], list[str]]
) -> dict[str, Any]:
    mask = batch.response_mask[row]

    def response(values: Tensor | None) -> list[Any]:
        return [] if values is None else values[row][mask].tolist()

    return {
        "step": step,
        "group": int(batch.group_ids[row]),
        "prompt": batch.prompts[row],
        "answer": batch.answers[row],
        "reward": float(batch.rewards[row]) if batch.rewards is not None else None,
        "reward_parts": {name: float(part[row]) for name, part in batch.reward_parts.items()},
        "advantage": float(batch.advantages[row]) if batch.advantages is not None else None,
        "finished": bool(batch.finished[row]),
        "tokens": pieces(response(batch.tokens)),
        "entropies": [round(value, 5) for value in response(batch.entropies)],
        "steps": response(step_ids),
        "clip": [int(inside) for inside in response(batch.clip_mask)],
    }


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    if lines := [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not outlive the lines of its steps


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    if path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_text("", encoding="utf-8")
        _append(partial, (row for row in read_lines(path) if keep(row)))
        partial.replace(path)
