"""Writes and reads the files of a run folder: metrics, rollouts, verifier failures. Only one rank writes."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from echorl_nemo.report.config import FAILURES_FILE, METRICS_FILE, ROLLOUTS_FILE, LoggerConfig
from echorl_nemo.report.trackers import make_trackers
from echorl_nemo.rollout.batch import RolloutBatch


@dataclass(frozen=True)
class ShownRollouts:
    """Rollouts of a step that the report shows."""

    batch: RolloutBatch
    step_ids: Tensor
    """[N, S] int64: the step of each response token, from `segment_steps`."""


class RunLogger:
    """Appends to the files of a run folder, and logs metrics to the trackers."""

    def __init__(self, folder: Path, config: LoggerConfig, *, first_step: int) -> None:
        """``first_step``: lines that an interrupted run wrote for this step and later ones are removed."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config = folder, config
        for name in (METRICS_FILE, ROLLOUTS_FILE, FAILURES_FILE):
            _keep_lines(folder / name, lambda row: row["step"] < first_step)
        self._trackers = make_trackers(folder, config, first_step=first_step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of training step ``step``, from 0; -1 is before the first."""
        _append(self.folder / METRICS_FILE, [{"step": step, **values}])
        for tracker in self._trackers:
            tracker.log(step, {name.replace(".", "/"): value for name, value in values.items()})

    def failures(self, step: int, failures: Iterable[dict[str, str]]) -> None:
        """Write the verdicts that were not reached in a step, each with its reason."""
        _append(self.folder / FAILURES_FILE, [{"step": step, **failure} for failure in failures])

    def rollouts(self, step: int, shown: ShownRollouts, pieces: Callable[[list[int]], list[str]]) -> None:
        """Write rollouts of the step. ``pieces`` gives the text of each token."""
        rows = [_record(step, shown.batch, row, shown.step_ids, pieces) for row in range(len(shown.batch))]
        _append(self.folder / ROLLOUTS_FILE, rows)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of the run folder; an empty list if there is no file. Damaged lines, and a last line
    that a killed run did not finish, are left out with a warning."""
    rows, damaged, unfinished = _parse(path)
    warn = logging.getLogger(__name__).warning
    for number, _, why in damaged:
        warn("%s:%d: damaged and left out: %s", path, number, why)
    if unfinished:
        warn("%s: its last line was not finished and is left out", path)
    return rows


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, bytes, str]], bytes]:
    """The rows of a file, its damaged lines (number, line, problem), and an unfinished last line."""
    if not path.is_file():
        return [], [], b""
    *lines, unfinished = path.read_bytes().split(b"\n")
    rows, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            rows.append(row)
        except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
            damaged.append((number, line, str(error)))
    return rows, damaged, unfinished


def replace_nonfinite(value: Any) -> Any:
    """``value`` with None in place of every number that is not finite, since JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    return [replace_nonfinite(item) for item in value] if isinstance(value, list) else value


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
        "advantage": None if batch.advantages is None else _mean_advantage(batch.advantages[row], mask),
        "finished": bool(batch.finished[row]),
        "expert": not bool(batch.sampled[row]),
        "tokens": pieces(response(batch.tokens)),
        "entropies": [round(value, 5) for value in response(batch.entropies)],
        "steps": response(step_ids),
        "clip": [round(weight, 7) for weight in response(batch.clip_weight)],
    }


def _mean_advantage(advantages: Tensor, mask: Tensor) -> float:
    """The advantage of a rollout; the mean over its response tokens where they differ."""
    inside = advantages[mask] if advantages.dim() else advantages
    return float(inside.mean()) if inside.numel() else 0.0


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _append_lines(path, [json.dumps(replace_nonfinite(row), ensure_ascii=False).encode() for row in rows])


def _append_lines(path: Path, lines: Sequence[bytes]) -> None:
    if lines:
        with path.open("ab") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())  # the lines of a step must be on the disk before its checkpoint


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file with the rows that ``keep`` accepts. Damaged lines, and those without a step, are moved to another
    file."""
    rows, damaged, _ = _parse(path)
    damaged += [(0, json.dumps(row).encode(), "no step") for row in rows if not isinstance(row.get("step"), int)]
    if damaged:
        aside = path.with_suffix(".damaged")
        _append_lines(aside, [line for _, line, _ in damaged])
        for number, _, why in damaged:
            logging.getLogger(__name__).warning("%s:%d: damaged (%s), set aside in %s", path, number, why, aside)
    if path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"")
        _append(partial, (row for row in rows if isinstance(row.get("step"), int) and keep(row)))
        partial.replace(path)
