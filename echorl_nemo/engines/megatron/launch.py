"""Starting ranks: under torchrun or srun this process is one of them, else the program starts its own."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.errors import UserError
from echorl_nemo.resilience.ending import OWN_LAUNCHER, RankEnding, Store, cause_was_said, is_done, say_done
from echorl_nemo.resilience.orphans import die_with_parent
from echorl_nemo.resilience.stop import EXIT_REQUEUE, SIGNALS, StopSignals
from echorl_nemo.resilience.streams import make_output_patient

RankFunction = Callable[[ExitStack], int]
"""Gives an exit code; what it starts is closed by the callbacks that it leaves with the stack."""
Connect = Callable[[], tuple[Store, int]]
"""Gives the store that all ranks share, and this rank's number."""
POLL_SECONDS = 0.1
FOLDER_PREFIX = "echorl-"
"""Of the temporary folder in which own ranks find each other."""


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
    of the ranks where all ended with the same. Under torchrun or srun this process is a rank, and ends here.

    A rank that fails ends the others. `SIGNALS` are passed on to the ranks, which take them with ``signals``, or end.
    """
    if outer_world() is not None:
        _adopt_slurm_environment()
        rank = int(os.environ["RANK"])
        ending = RankEnding(rank)
        ending.run(lambda closers: _as_rank(function, platform, ending, _outer_store, world, timeout_minutes, signals))
    platform.check_devices(world)
    make_output_patient()
    with _rendezvous_folder() as folder:
        context: Any = multiprocessing.get_context(platform.start_method)
        path, parent = str(folder / "rendezvous"), os.getpid()
        ranks = [
            context.Process(
                target=_child,
                args=(function, platform, path, rank, world, timeout_minutes, parent, signals),
                name=f"rank {rank}",
            )
            for rank in range(world)
        ]
        # without ``signals`` there is nothing to save, and a ctrl-C interrupts this program as any other
        passed = SIGNALS if signals is not None else tuple(each for each in SIGNALS if each != signal.SIGINT)
        with _passing_on(passed, ranks) as pass_on_missed:
            # held back until a rank listens: it would take the handler of this process, or die
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for process in ranks:
                process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            pass_on_missed()
            return _wait(ranks, _file_store(path, world))


def _wait(ranks: list[Any], store: Store) -> int:
    """The exit code of all ranks, 1 if they differ. Says which rank failed where no rank has said why."""
    try:
        while any(process.is_alive() for process in ranks) and not _failed(ranks, store):
            time.sleep(POLL_SECONDS)
        failed = _failed(ranks, store)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()  # a rank takes SIGTERM for a wish to be heard between steps
        for process in ranks:
            process.join()
    if failed and not cause_was_said(store):
        for process in failed:
            how = f"exit code {process.exitcode}" if process.exitcode >= 0 else f"signal {-process.exitcode}"
            print(f"error: {process.name} (process {process.pid}) ended with {how}", file=sys.stderr)
    codes = {process.exitcode for process in ranks}
    return codes.pop() if len(codes) == 1 and not failed else 1


def _failed(ranks: list[Any], store: Store) -> list[Any]:
    """The ranks that have ended otherwise than by being done."""
    ended = [(rank, process) for rank, process in enumerate(ranks) if process.exitcode is not None]
    return [process for rank, process in ended if process.exitcode not in (0, EXIT_REQUEUE) or not is_done(store, rank)]


@contextmanager
def _rendezvous_folder() -> Iterator[Path]:
    """A temporary folder, locked while it is used, so that one of a launcher that was killed is recognised and
    removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/lock"):
        try:
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent)
        except OSError:  # another run's, or another user's
            continue
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as name, (Path(name) / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


@contextmanager
def _passing_on(signals: Sequence[signal.Signals], ranks: list[Any]) -> Iterator[Callable[[], None]]:
    """While the ranks run, ``signals`` are theirs. Gives a function for the moment when all have started: it passes on
    what came before."""
    missed: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        if any(process.pid is None for process in ranks):
            missed.append(number)
            return
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, number)

    def pass_on_missed() -> None:
        for number in missed:
            pass_on(number, None)

    before = {number: signal.signal(number, pass_on) for number in signals}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield pass_on_missed
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def _child(
    function: RankFunction,
    platform: Platform,
    meeting: str,
    rank: int,
    world: int,
    timeout_minutes: int,
    parent: int,
    signals: StopSignals | None,
) -> None:
    die_with_parent(parent)
    os.setpgid(0, 0)  # a terminal's ctrl-C goes to the launcher, which passes it on once
    os.environ[OWN_LAUNCHER] = str(parent)
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(rank), str(world)
    signal.set_wakeup_fd(-1)
    if signals is None:  # not the handlers of the process that this one was forked from
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    ending = RankEnding(rank)

    def connect() -> tuple[Store, int]:
        return _file_store(meeting, world), rank

    ending.run(lambda closers: _as_rank(function, platform, ending, connect, world, timeout_minutes, signals))


def _as_rank(
    function: RankFunction,
    platform: Platform,
    ending: RankEnding,
    connect: Connect,
    world: int,
    timeout_minutes: int,
    signals: StopSignals | None,
) -> int:
    if signals is not None:
        signals.listen(end_at_once=ending.at_once, peer_is_gone=ending.peer_is_gone)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if platform.backend == "gloo" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cpus() // _local_ranks(world)))
    platform.device()
    store, rank = connect()
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=timeout_minutes)
    )
    ending.meet(store, world)
    code = function(ending.closers)
    say_done(store, rank)
    dist.destroy_process_group()
    return code


def _file_store(path: str, world: int) -> Store:
    return dist.FileStore(path, world)  # type: ignore[attr-defined]


def _outer_store() -> tuple[Store, int]:
    """Of torchrun's or srun's environment variables."""
    store, rank, _ = next(rendezvous("env://"))
    return store, rank


def available_cpus() -> int:
    """CPUs that this process may use: those of its affinity mask, or as many as its cgroup's quota allows."""
    affinity = len(os.sched_getaffinity(0))
    for quota in _cgroup_quotas():
        affinity = min(affinity, max(1, round(quota)))
    return affinity


def _cgroup_quotas() -> Iterator[float]:
    """CPUs that control groups of version 2 and 1 allow, where they set a limit."""
    root = Path("/sys/fs/cgroup")
    for path in (root / "cpu.max", root / "cpu" / "cpu.cfs_quota_us"):
        if not path.is_file():
            continue
        words = path.read_text(encoding="utf-8").split()
        if len(words) == 1 and (period := path.with_name("cpu.cfs_period_us")).is_file():
            words.append(period.read_text(encoding="utf-8").strip())
        if len(words) == 2 and words[0] not in ("max", "-1"):
            yield int(words[0]) / int(words[1])


def _local_ranks(world: int) -> int:
    """Ranks of this machine."""
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0].split(",")[0]
    return int(os.environ.get("LOCAL_WORLD_SIZE") or slurm or world)


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
