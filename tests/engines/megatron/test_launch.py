"""Ranks that the program starts by itself."""

import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from echorl_nemo.engines.megatron.launch import external_world_size, launch
from echorl_nemo.errors import UserError
from echorl_nemo.resilience.stop import EXIT_REQUEUE, SIGNALS, StopSignals
from tests.engines.megatron.helpers import PLATFORM


def test_every_rank_runs_and_meets_the_others(tmp_path: Path) -> None:
    def rank(_: ExitStack) -> int:
        everyone = [0] * dist.get_world_size()
        dist.all_gather_object(everyone, dist.get_rank())
        (tmp_path / str(dist.get_rank())).write_text(str(everyone))
        return 0

    assert launch(rank, 3, PLATFORM, timeout_minutes=1) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["[0, 1, 2]"] * 3


def test_a_rank_that_dies_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    def rank(_: ExitStack) -> int:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        time.sleep(60)
        return 0

    start = time.monotonic()
    assert launch(rank, 2, PLATFORM, timeout_minutes=1) == 1
    assert time.monotonic() - start < 30
    assert re.fullmatch(r"error: rank 1 \(process \d+\) ended with signal 9\n", capfd.readouterr().err)


def test_a_user_error_on_a_rank_is_reported_without_a_trace(capfd: pytest.CaptureFixture[str]) -> None:
    def rank(_: ExitStack) -> int:
        if dist.get_rank() == 0:
            raise UserError("trainer.x=1 is wrong; use 2")
        time.sleep(60)
        return 0

    assert launch(rank, 2, PLATFORM, timeout_minutes=1) == 1
    assert capfd.readouterr().err == "error: trainer.x=1 is wrong; use 2\n"


def test_torchrun_and_srun_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "16")  # the batch script of a job of 16 tasks
    assert external_world_size() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert external_world_size() == 16
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert external_world_size() == 4


def test_srun_without_an_address_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="MASTER_ADDR is not set; before srun"):
        launch(lambda _: 0, 2, PLATFORM, timeout_minutes=1)


def test_ranks_that_want_to_be_started_again_say_so_together() -> None:
    assert launch(lambda _: EXIT_REQUEUE, 2, PLATFORM, timeout_minutes=1) == EXIT_REQUEUE
    assert launch(lambda _: EXIT_REQUEUE if dist.get_rank() else 0, 2, PLATFORM, timeout_minutes=1) == 1


def test_signals_go_to_every_rank(tmp_path: Path) -> None:
    """And the handlers of this process are back afterwards."""

    def rank(_: ExitStack) -> int:
        signals = StopSignals().listen()
        dist.barrier()
        if dist.get_rank() == 0:
            os.kill(os.getppid(), signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not signals.received and time.monotonic() < deadline:
            time.sleep(0.01)
        (tmp_path / str(dist.get_rank())).write_text(signals.received)
        return EXIT_REQUEUE

    before = signal.getsignal(signal.SIGUSR1)
    assert launch(rank, 2, PLATFORM, timeout_minutes=1) == EXIT_REQUEUE
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["SIGUSR1"] * 2
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_that_comes_while_ranks_start_is_not_lost(tmp_path: Path) -> None:
    signals = StopSignals()

    def rank(_: ExitStack) -> int:
        (tmp_path / str(dist.get_rank())).write_text(signals.received)
        return 0

    def warned() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)  # blocked in `launch` while it forks, as if it came then
        sys.exit(launch(rank, 2, PLATFORM, timeout_minutes=1, signals=signals))

    signals.listen()
    starter = multiprocessing.get_context("fork").Process(target=warned)
    starter.start()
    starter.join(30)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    assert starter.exitcode == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["SIGUSR1"] * 2


def test_ranks_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    def rank(_: ExitStack) -> int:
        (tmp_path / str(dist.get_rank())).write_text(str(os.getpid()))
        time.sleep(60)
        return 0

    starter = multiprocessing.get_context("fork").Process(
        target=launch, args=(rank, 2, PLATFORM), kwargs={"timeout_minutes": 1}
    )
    starter.start()
    deadline = time.monotonic() + 30
    files = [tmp_path / str(rank) for rank in range(2)]
    while not all(path.exists() and path.read_text() for path in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starter.kill()
    starter.join()
    while any(_alive(int(path.read_text())) for path in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
