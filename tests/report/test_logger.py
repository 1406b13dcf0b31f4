import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from echorl_nemo.errors import UserError
from echorl_nemo.report.logger import LoggerConfig, RunLogger, read_lines
from echorl_nemo.rollout.batch import RolloutBatch


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, LoggerConfig(), first_step=0)
    logger.metrics(0, {"reward": 0.5, "echorl.clips": 3.0})
    logger.metrics(1, {"reward": 0.75})
    logger.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "reward": 0.5, "echorl.clips": 3.0},
        {"step": 1, "reward": 0.75},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(0, 0.5), (1, 0.75)]
    assert board.Scalars("echorl/clips")[0].value == 3.0


def test_a_resumed_run_drops_what_it_does_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    RunLogger(tmp_path, LoggerConfig(tensorboard=False), first_step=2)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]
    assert not list(tmp_path.glob("*.partial"))


def test_the_first_groups_are_kept_whole(tmp_path: Path) -> None:
    clip = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    batch = RolloutBatch(
        tokens=torch.arange(18).view(6, 3),
        response_mask=torch.tensor([[False, True, True]] * 6),
        lengths=torch.full((6,), 3),
        finished=torch.ones(6, dtype=torch.bool),
        group_ids=torch.tensor([7, 7, 9, 8, 8, 9]),
        prompts=list("abcdef"),
        answers=list("123456"),
        rewards=torch.ones(6),
        reward_parts={"math": torch.ones(6)},
        advantages=torch.zeros(6),
        entropies=torch.full((6, 3), 0.123456),
        clip_mask=clip,
    )
    logger = RunLogger(tmp_path, LoggerConfig(tensorboard=False, groups=2), first_step=0)
    logger.rollouts(4, batch, torch.tensor([[-1, 0, 1]] * 6), lambda ids: [str(i) for i in ids])
    rows = read_lines(tmp_path / "rollouts.jsonl")
    assert [(row["group"], row["prompt"]) for row in rows] == [(7, "a"), (7, "b"), (9, "c"), (9, "f")]
    assert rows[1]["clip"] == [1, 0] and rows[0]["clip"] == [0, 0] and rows[0]["reward_parts"] == {"math": 1.0}
    assert rows[1]["tokens"] == ["4", "5"] and rows[1]["entropies"] == [0.12346] * 2 and rows[1]["steps"] == [0, 1]


def test_trackers_that_are_not_installed_are_told() -> None:
    with pytest.raises(UserError, match="logger.wandb_project=mine: the package wandb is not installed"):
        LoggerConfig(wandb_project="mine")


class _Calls(types.ModuleType):
    """Stands in for a tracker's library: remembers what it was asked."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.__spec__ = types.SimpleNamespace(name=name, origin=name)  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args or kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("package", "field", "log"), [("wandb", "wandb_project", "log"), ("mlflow", "mlflow_experiment", "log_metrics")]
)
def test_trackers_get_the_metrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, field: str, log: str
) -> None:
    """Against a stand-in: neither library is installed here."""
    module = _Calls(package)
    monkeypatch.setitem(sys.modules, package, module)
    config = LoggerConfig(tensorboard=False, **{field: "mine"})  # type: ignore[arg-type]
    logger = RunLogger(tmp_path / "run-7", config, first_step=0)
    logger.metrics(0, {"echorl.clips": 3.0})
    logger.close()
    assert (log, ({"echorl/clips": 3.0},)) in module.calls
    assert any("mine" in str(details) for _, details in module.calls)
