"""Starting ranks: under torchrun or srun this process is one of them, else the program starts its own."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.errors import UserError, tell
from echorl_nemo.resilience.orphans import die_with_parent
from echorl_nemo.resilience.stop import EXIT_REQUEUE, SIGNALS, StopSignals

RankFunction = Callable[[], int]
"""Gives an exit code."""
POLL_SECONDS = 0.1


def outer_world() -> int | None:
    """Ranks started by torchrun or srun, None if this process is on its own."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # a batch script, too, has SLURM_PROCID and SLURM_NTASKS; only a step that srun started has this one
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return tasks if tasks > 1 else None


def launch(
    function: RankFunction,
    world: int,
    platform: Platform,
    *,
    timeout_minutes: int,
    signals: StopSignals | None = None,
) -> int:
    """Run ``function`` on every one of ``world`` ranks with torch.distributed initialised; returns an exit code, that
    of the ranks where all ended with the same.

    A rank that fails ends the others: nobody waits for the dead. SIGUSR1 and SIGTERM are passed on to the ranks, which
    take them with ``signals``, or end.
    """
    outer = outer_world()
    if outer is not None:
        _adopt_slurm_environment()
        return _as_rank(function, platform, "env://", int(os.environ["RANK"]), world, timeout_minutes)
    with tempfile.TemporaryDirectory(prefix="echorl-") as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        if world == 1:
            return _as_rank(function, platform, rendezvous, 0, 1, timeout_minutes)
        platform.check_devices(world)
        context: Any = multiprocessing.get_context(platform.start_method)
        parent = os.getpid()
        ranks = [
            context.Process(
                target=_child,
                args=(function, platform, rendezvous, rank, world, timeout_minutes, parent, signals),
                name=f"rank {rank}",
            )
            for rank in range(world)
        ]
        with _passing_signals_on(ranks):
            # held back until a rank listens: it would take the handler of this process, or die
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for process in ranks:
                process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return _wait(ranks)


def _wait(ranks: list[Any]) -> int:
    """The exit code of all ranks, 1 if they differ."""
    try:
        while any(process.is_alive() for process in ranks) and not any(_failed(process) for process in ranks):
            time.sleep(POLL_SECONDS)
        failed = [process for process in ranks if _failed(process)]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()  # a rank takes SIGTERM for a wish to be heard between steps
        for process in ranks:
            process.join()
    for process in failed:
        if process.exitcode < 0:
            print(f"{process.name} was killed by signal {-process.exitcode}", file=sys.stderr)
    codes = {process.exitcode for process in ranks}
    return codes.pop() if len(codes) == 1 and not failed else 1


def _failed(process: Any) -> bool:
    return process.exitcode not in (None, 0, EXIT_REQUEUE)


@contextmanager
def _passing_signals_on(ranks: list[Any]) -> Iterator[None]:
    """While the ranks run, SIGUSR1 and SIGTERM are theirs."""

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in ranks:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _child(
    function: RankFunction,
    platform: Platform,
    rendezvous: str,
    rank: int,
    world: int,
    timeout_minutes: int,
    parent: int,
    signals: StopSignals | None,
) -> None:
    die_with_parent(parent)
    if signals is not None:
        signals.listen()
    else:  # not the handlers of the process that this one was forked from
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        sys.exit(_as_rank(function, platform, rendezvous, rank, world, timeout_minutes))
    except UserError as error:
        tell(error, rank=rank)
        sys.exit(1)


def _as_rank(
    function: RankFunction, platform: Platform, rendezvous: str, rank: int, world: int, timeout_minutes: int
) -> int:
    os.environ.setdefault("LOCAL_RANK", str(rank))
    if platform.backend == "gloo":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    platform.device()
    dist.init_process_group(
        platform.backend,
        init_method=rendezvous,
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=timeout_minutes),
    )
    code = function()
    dist.destroy_process_group()
    return code


def _adopt_slurm_environment() -> None:
    """srun names its variables differently from torchrun."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name} is not set: under srun, export MASTER_ADDR (the job's first host) and MASTER_PORT before it"
            )
    for ours, slurms in (
        ("RANK", "SLURM_PROCID"),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        ("LOCAL_RANK", "SLURM_LOCALID"),
    ):
        if ours not in os.environ and slurms in os.environ:
            os.environ[ours] = os.environ[slurms]
