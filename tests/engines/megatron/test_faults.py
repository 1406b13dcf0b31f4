"""Injected faults: a run loses nothing that it had saved, and says what happened."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.chaos import metrics_of
from echorl_nemo.engines.megatron import worker
from echorl_nemo.engines.megatron.trainer import StepResult, Trainer
from echorl_nemo.report.config import FAILURES_FILE, METRICS_FILE
from echorl_nemo.report.logger import read_lines
from echorl_nemo.resilience.checkpoints import CheckpointFolder
from echorl_nemo.resilience.stop import EXIT_REQUEUE, StopRequest, StopSignals
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, run_to_end, tiny_config
from tests.engines.megatron.test_checkpoint import (
    RESUME,
    Ranks,
    assert_the_same_run,
    run,
    run_config,
    told_by,
)

SAVE = "trainer.save_every=1"


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing happened to, at TP2."""
    os.chdir(Path(__file__).resolve().parents[3])
    folder = tmp_path_factory.mktemp("straight")
    ranks(2, run, run_config(folder, *LAYOUTS["TP2"], SAVE))
    return folder


# ---- checkpoints


def _interrupted(ranks: Ranks, folder: Path) -> None:
    """Four of six steps, the newest two checkpoints kept."""
    config = run_config(folder, *LAYOUTS["TP2"], SAVE, "trainer.export=false")
    config.trainer.steps = 4
    ranks(2, run, config)


def _truncate(checkpoint: Path) -> None:
    path = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def _flip_a_bit(checkpoint: Path) -> None:
    path = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def _lose_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("*.distcp")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_truncate, "bytes, not"), (_flip_a_bit, "its checksum differs"), (_lose_a_file, "is missing")],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    ranks: Ranks, tmp_path: Path, straight: Path, capfd: Any, damage: Callable[[Path], None], message: str
) -> None:
    _interrupted(ranks, tmp_path)
    damage(tmp_path / "checkpoints" / "step-000004")
    ranks(2, run, run_config(tmp_path, *LAYOUTS["TP2"], SAVE, RESUME))
    printed = capfd.readouterr().err
    assert "step-000004 is damaged" in printed and message in printed and "step-000003 is taken" in printed
    assert_the_same_run(tmp_path, straight)
    assert [path.name.split(".")[1][:7] for path in (tmp_path / "checkpoints").glob("step-000004.*")] == ["damaged"]


def test_no_run_starts_over_because_every_checkpoint_is_damaged(ranks: Ranks, tmp_path: Path) -> None:
    _interrupted(ranks, tmp_path)
    for checkpoint in CheckpointFolder(tmp_path / "checkpoints").complete():
        _flip_a_bit(checkpoint)
    before = metrics_of(tmp_path)
    for _ in range(2):  # nor at the next try
        for code, message in ranks(2, told_by, run_config(tmp_path, *LAYOUTS["TP2"], RESUME)):
            assert code == -1 and "every checkpoint is damaged (step-000003, step-000004)" in message
        assert metrics_of(tmp_path) == before


def test_no_run_starts_over_because_its_checkpoints_are_elsewhere(ranks: Ranks, tmp_path: Path) -> None:
    rows = [{"step": step, "reward": 0.5} for step in range(-1, 3)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((code, message),) = ranks(1, told_by, run_config(tmp_path, SAVE, RESUME))
    assert code == -1 and "3 steps were made and there is no checkpoint; check that its storage is mounted" in message
    assert len(metrics_of(tmp_path)) == 4


def _run_on_a_small_disk(config: RunConfig, limit: int) -> tuple[int, str]:
    """No file may grow beyond ``limit`` bytes, as on a disk that is full."""
    step, seen = Trainer.step, 0

    def watched(trainer: Trainer) -> StepResult:
        nonlocal seen
        seen += 1
        if seen == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return step(trainer)

    Trainer.step = watched  # type: ignore[assignment, method-assign]
    end = told_by(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return end


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_file_that_cannot_be_written_ends_the_run_and_leaves_the_checkpoint_before(
    ranks: Ranks, tmp_path: Path, straight: Path, asynchronous: bool
) -> None:
    overrides = [*LAYOUTS["TP2"], SAVE, f"checkpoint.asynchronous={asynchronous}"]
    for code, message in ranks(2, _run_on_a_small_disk, run_config(tmp_path, *overrides), 100_000):
        assert code == -1 and "the checkpoint could not be written: Worker failure: " in message
        assert "step-000002 is untouched; make room in" in message and "trainer.resume=true" in message
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000001", "step-000002"]
    ranks(2, run, run_config(tmp_path, *overrides, RESUME))
    assert_the_same_run(tmp_path, straight)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_a_full_disk(ranks: Ranks, tmp_path: Path) -> None:
    """A real one, which has no room for every checkpoint of the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=True)
    try:
        config = run_config(disk / "run", SAVE, "trainer.export=false", "checkpoint.keep_last=9")
        ((code, message),) = ranks(1, told_by, config)
        assert code == -1 and "No space left on device" in message and "is untouched; make room in" in message
        (newest, *_) = CheckpointFolder(disk / "run" / "checkpoints").complete()
        for old in CheckpointFolder(disk / "run" / "checkpoints").complete()[1:]:
            CheckpointFolder(disk / "run" / "checkpoints").remove(old)
        resumed = run_config(
            disk / "run", SAVE, RESUME, "trainer.export=false", "checkpoint.keep_last=1", "logger.rollouts_every=100"
        )
        resumed.trainer.steps = int(newest.name[-6:]) + 1
        assert ranks(1, told_by, resumed) == [(0, "")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- preemption


def _preempted(config: RunConfig, rank: int, step: int) -> int:
    """A signal that only one rank gets, in the middle of a step."""
    estimate, seen = Trainer.estimate_advantages, 0

    def watched(trainer: Trainer, batch: Any) -> None:
        nonlocal seen
        if seen == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        seen += 1
        estimate(trainer, batch)

    Trainer.estimate_advantages = watched  # type: ignore[assignment, method-assign]
    return run(config)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_signal_to_one_rank_saves_and_ends_all(
    ranks: Ranks, tmp_path: Path, straight: Path, capfd: Any, asynchronous: bool
) -> None:
    overrides = [*LAYOUTS["TP2"], "trainer.save_every=4", f"checkpoint.asynchronous={asynchronous}"]
    assert ranks(2, _preempted, run_config(tmp_path, *overrides), 1, 2) == [EXIT_REQUEUE] * 2
    printed = f"stopped after step 3: SIGUSR1; saved, exit code {EXIT_REQUEUE}"
    assert printed in capfd.readouterr().out and (tmp_path / "requeue").read_text() == f"{printed}\n"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "stopped"
    assert ranks(2, run, run_config(tmp_path, *overrides, RESUME)) == [0, 0]
    assert_the_same_run(tmp_path, straight)
    assert not (tmp_path / "requeue").exists()


def _asked_while_loading(config: RunConfig) -> int:
    return run_to_end(config, StopSignals("SIGUSR1"))


def test_a_signal_that_came_before_the_ranks_is_not_lost(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(1, _asked_while_loading, run_config(tmp_path)) == [EXIT_REQUEUE]
    assert "stopped after step 0: SIGUSR1; nothing to save" in (tmp_path / "requeue").read_text()
    assert not (tmp_path / "checkpoints").exists() and metrics_of(tmp_path) == []


def _run_by_a_clock(config: RunConfig, readings: list[float]) -> int:
    """The clock is read before the first step and after each."""
    waiting = iter(readings)
    worker.StopRequest = partial(StopRequest, clock=lambda: next(waiting))  # type: ignore[assignment, attr-defined]
    return run(config)


def test_a_run_ends_before_its_job_does(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_START_TIME", "100000")
    overrides = ["resilience.time_limit_minutes=1000", "trainer.export=false"]  # until 160000
    assert ranks(1, _run_by_a_clock, run_config(tmp_path, *overrides), [160001.0]) == [EXIT_REQUEUE]
    assert "stopped after step 0: the job ends in 0 s" in (tmp_path / "requeue").read_text()
    readings = [100000.0, 100001.0, 159990.0]  # the margin is two minutes and more
    assert ranks(1, _run_by_a_clock, run_config(tmp_path, *overrides, RESUME), readings) == [EXIT_REQUEUE]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "step-000002"
    assert "stopped after step 2: the job ends in 10 s" in (tmp_path / "requeue").read_text()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(ranks: Ranks, tmp_path: Path, straight: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": -1, "eval.accuracy": 0.5}\n{"step": 0, "reward": 1}\n')
    ranks(2, run, run_config(tmp_path, *LAYOUTS["TP2"], SAVE, RESUME))
    assert_the_same_run(tmp_path, straight)


def _slow_once(config: RunConfig) -> int:
    step, seen = Trainer.step, 0

    def slow(trainer: Trainer) -> StepResult:
        nonlocal seen
        seen += 1
        if seen == 2:
            _stand_still()
        return step(trainer)

    Trainer.step = slow  # type: ignore[assignment, method-assign]
    return run(config)


def _stand_still() -> None:
    time.sleep(8.0)


def test_a_step_that_takes_too_long_leaves_the_stacks_of_every_rank(ranks: Ranks, tmp_path: Path, capfd: Any) -> None:
    config = run_config(tmp_path, *LAYOUTS["TP2"], "resilience.step_limit_minutes=0.08", "trainer.export=false")
    config.trainer.steps = 3
    assert ranks(2, _slow_once, config) == [0, 0]
    for rank in range(2):
        assert "in _stand_still" in (tmp_path / "stacks" / f"rank-{rank:04d}.txt").read_text()
    assert "step 2 takes longer than 0.08 minutes" in capfd.readouterr().out


# ---- data, verifiers, folders


def _with_data_of_its_own(config: RunConfig, folder: Path) -> tuple[int, str]:
    config.data.train = str(folder / f"rank-{dist.get_rank()}.jsonl")
    return told_by(config)


def test_ranks_with_other_data_are_reported_apart(ranks: Ranks, tmp_path: Path) -> None:
    lines = Path(tiny_config().data.train).read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / f"rank-{rank}.jsonl").write_text("".join(lines[rank:]))
    for code, message in ranks(2, _with_data_of_its_own, run_config(tmp_path / "run", *LAYOUTS["TP2"]), tmp_path):
        assert code == -1 and f"reads {len(lines)} prompts" in message and f"{len(lines) - 1} prompts" in message


def test_a_data_file_that_shrank_is_reported(ranks: Ranks, tmp_path: Path) -> None:
    lines = Path(tiny_config().data.train).read_text().splitlines(keepends=True)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(lines))
    overrides = [f"data.train={data}", "trainer.export=false"]
    config = run_config(tmp_path / "run", *overrides)
    config.trainer.steps = 2
    ranks(1, run, config)
    data.write_text("".join(lines[:-1]))
    ((code, message),) = ranks(1, told_by, run_config(tmp_path / "run", *overrides, RESUME))
    assert (
        code == -1
        and f"data.train={data}: its prompts are not those that the run was trained on until step 2" in message
    )
    assert f"({len(lines)} prompts" in message and f"now {len(lines) - 1} prompts" in message
    assert "checkpoint.accept_changed_data=true" in message
    accepted = run_config(tmp_path / "run", *overrides, RESUME, "checkpoint.accept_changed_data=true")
    assert ranks(1, told_by, accepted) == [(0, "")]


def test_verifier_timeouts_are_counted_by_problem(ranks: Ranks, tmp_path: Path) -> None:
    config = run_config(
        tmp_path, "data.reward=tests.rewards.verifiers:hangs_on_four", "data.reward_timeout=0.3",
        "trainer.export=false", f"data.train={tmp_path / 'prompts.jsonl'}", "data.reward_workers=1",
        "rollout.group_size=2",
    )  # fmt: skip
    lines = Path(tiny_config().data.train).read_text().splitlines(keepends=True)[:4]
    rows = [{**json.loads(line), "answer": "4" if n == 0 else "5"} for n, line in enumerate(lines)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.trainer.steps = 2
    ranks(1, run, config)
    assert [row["verify.timeouts"] for row in metrics_of(tmp_path)] == [2, 2]
    failures = read_lines(tmp_path / FAILURES_FILE)
    assert [failure["timeouts"] for failure in failures] == ["1", "2", "3", "4"]
    assert {failure["prompt"] for failure in failures} == {rows[0]["prompt"]}


def _stand_in_the_folder(config: RunConfig, ready: str) -> int:
    step = Trainer.step

    def waiting(trainer: Trainer) -> StepResult:
        if dist.get_rank() == 0:
            Path(ready).touch()
            while Path(ready).exists():
                time.sleep(0.05)
        return step(trainer)

    Trainer.step = waiting  # type: ignore[assignment, method-assign]
    return run_to_end(config)


def test_two_runs_in_one_folder(ranks: Ranks, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", SAVE, "trainer.export=false")
    config.trainer.steps = 1
    ready = tmp_path / "ready"
    fork = multiprocessing.get_context("fork")
    first = fork.Process(target=ranks, args=(1, _stand_in_the_folder, config, str(ready)))
    first.start()
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for code, message in ranks(2, told_by, run_config(tmp_path / "run", *LAYOUTS["TP2"], SAVE, RESUME)):
        assert code == -1 and "another run writes there (process " in message
    ready.unlink()
    first.join()
    assert first.exitcode == 0 and len(metrics_of(tmp_path / "run")) == 1
