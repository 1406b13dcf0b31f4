import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from echorl_nemo.report.config import LoggerConfig
from echorl_nemo.report.logger import RunLogger, ShownRollouts, read_lines
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


def test_damaged_lines_are_named_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = [b'{"step": 1, "rew', b'{"step": 2, "\xff"}', b"[1]", b'{"reward": 1}']
    path.write_bytes(b'{"step": 0}\n' + b"\n".join(damaged) + b'\n{"step": 3}\n')
    assert read_lines(path) == [{"step": 0}, {"reward": 1}, {"step": 3}]
    assert [f"{path}:{n}: damaged" in caplog.text for n in range(1, 7)] == [False, True, True, True, False, False]
    RunLogger(tmp_path, LoggerConfig(tensorboard=False), first_step=9)
    assert read_lines(path) == [{"step": 0}, {"step": 3}]
    assert (tmp_path / "metrics.damaged").read_bytes().splitlines() == damaged


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    RunLogger(tmp_path, LoggerConfig(tensorboard=False), first_step=0).metrics(0, {"reward": float("nan"), "x": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "reward": null, "x": 1.0}\n'


def test_rollouts_are_written_with_all_that_the_report_shows(tmp_path: Path) -> None:
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
        clip_weight=clip,
    )
    logger = RunLogger(tmp_path, LoggerConfig(tensorboard=False, groups=2), first_step=0)
    shown = ShownRollouts(batch.select([0, 1, 2, 5]), torch.tensor([[-1, 0, 1]] * 4))
    logger.rollouts(4, shown, lambda ids: [str(i) for i in ids])
    rows = read_lines(tmp_path / "rollouts.jsonl")
    assert [(row["group"], row["prompt"]) for row in rows] == [(7, "a"), (7, "b"), (9, "c"), (9, "f")]
    assert rows[1]["clip"] == [1, 0] and rows[0]["clip"] == [0, 0] and rows[0]["reward_parts"] == {"math": 1.0}
    assert rows[1]["tokens"] == ["4", "5"] and rows[1]["entropies"] == [0.12346] * 2 and rows[1]["steps"] == [0, 1]


def _log_twice(folder: Path, **settings: str) -> None:
    """As a run and its resumption do."""
    for step in (0, 1):
        config = LoggerConfig(tensorboard=False, **settings)  # type: ignore[arg-type]
        logger = RunLogger(folder, config, first_step=step)
        logger.metrics(step, {"echorl.clips": 3.0 + step})
        logger.close()


def test_mlflow_gets_the_metrics_of_a_run_and_its_resumption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _log_twice(tmp_path / "run-7", mlflow_experiment="mine")
    (run,) = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "echorl/clips")
    assert run.info.run_name == "run-7" and [(m.step, m.value) for m in history] == [(1, 3.0), (2, 4.0)]


def test_wandb_gets_the_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # offline, a resumed run is not distinguishable from one of the same second, and may lose what it logs as it ends
    logger = RunLogger(tmp_path / "run-7", LoggerConfig(tensorboard=False, wandb_project="mine"), first_step=0)
    logger.metrics(0, {"echorl.clips": 3.0})
    logger.close()
    logged: list[list[dict[str, str]]] = []
    deadline = time.monotonic() + 30
    while not any(logged) and time.monotonic() < deadline:  # W&B's own process writes, and may do so after the end
        logs = list((tmp_path / "run-7" / "wandb").glob("offline-run-*-run-7/run-run-7.wandb"))
        logged = [_wandb_history(path) for path in logs]
        time.sleep(0.1)
    assert [[row["echorl/clips"] for row in rows] for rows in logged] == [["3"]], logged


def _wandb_history(path: Path) -> list[dict[str, str]]:
    """The rows that an offline run keeps: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, rows = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        assert kind in (0, 1), "no record of a run as short as this is split over blocks"
        record = wandb_internal_pb2.Record.FromString(content[at + 7 : at + 7 + size])
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
        at += 7 + size
    return rows
