"""Starts the ranks of a run. Under torchrun or srun this process is one of them; otherwise it starts them itself."""

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
from echorl_nemo.resilience.ending import OWN_LAUNCHER, RankEnding, Store, cause_was_printed, is_done, mark_done
from echorl_nemo.resilience.orphans import die_with_parent
from echorl_nemo.resilience.stop import EXIT_REQUEUE, SIGNALS, StopSignals
from echorl_nemo.resilience.streams import tolerate_closed_output

RankFunction = Callable[[ExitStack], int]
"""The work of a rank. It returns an exit code, and adds a callback to the stack for everything that must be closed."""
Connect = Callable[[], tuple[Store, int]]
"""Returns the store that all ranks share, and this rank's number."""
POLL_SECONDS = 0.1
FOLDER_PREFIX = "echorl-"
"""Prefix of the temporary folder in which the ranks that this program starts find each other."""


def external_world_size() -> int | None:
    """Number of ranks that torchrun or srun started; None if neither started this process."""
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
    """Run ``function`` on ``world`` ranks with torch.distributed initialised. Returns the exit code of the ranks, 1 if
    theirs differ. Under torchrun or srun this process is a rank: it runs ``function`` and ends here.

    If a rank fails the others are ended. `SIGNALS` are forwarded to the ranks, which receive them through ``signals``;
    with None a signal ends them.
    """
    if external_world_size() is not None:
        _adopt_slurm_environment()
        rank = int(os.environ["RANK"])
        ending = RankEnding(rank)
        ending.run(
            lambda closers: _as_rank(function, platform, ending, _external_store, world, timeout_minutes, signals)
        )
    platform.check_devices(world)
    tolerate_closed_output()
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
        # without ``signals`` there is nothing to save, and ctrl-C interrupts this program like any other
        passed = SIGNALS if signals is not None else tuple(each for each in SIGNALS if each != signal.SIGINT)
        with _forwarding(passed, ranks) as forward_missed:
            # blocked until the ranks listen: before that a rank would run this process's handler, or die
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for process in ranks:
                process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            forward_missed()
            return _wait(ranks, _file_store(path, world))


def _wait(ranks: list[Any], store: Store) -> int:
    """Wait for all ranks and return their exit code, 1 if theirs differ. Prints which rank failed if no rank has
    printed a cause."""
    try:
        while any(process.is_alive() for process in ranks) and not _failed(ranks, store):
            time.sleep(POLL_SECONDS)
        failed = _failed(ranks, store)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()  # after SIGTERM a rank would finish its step first
        for process in ranks:
            process.join()
    if failed and not cause_was_printed(store):
        for process in failed:
            how = f"exit code {process.exitcode}" if process.exitcode >= 0 else f"signal {-process.exitcode}"
            print(f"error: {process.name} (process {process.pid}) ended with {how}", file=sys.stderr)
    codes = {process.exitcode for process in ranks}
    return codes.pop() if len(codes) == 1 and not failed else 1


def _failed(ranks: list[Any], store: Store) -> list[Any]:
    """The ranks that have ended without finishing their work."""
    ended = [(rank, process) for rank, process in enumerate(ranks) if process.exitcode is not None]
    return [process for rank, process in ended if process.exitcode not in (0, EXIT_REQUEUE) or not is_done(store, rank)]


@contextmanager
def _rendezvous_folder() -> Iterator[Path]:
    """A temporary folder that is locked while it is used. Folders of launchers that were killed are not locked, and are
    removed here."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/lock"):
        try:
            with left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent)
        except OSError:  # another run's, or another user's
            continue
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as name, (Path(name) / "new").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (Path(name) / "new").rename(Path(name) / "lock")  # another launcher that starts now never sees it unlocked
        yield Path(name)


@contextmanager
def _forwarding(signals: Sequence[signal.Signals], ranks: list[Any]) -> Iterator[Callable[[], None]]:
    """Forward ``signals`` to the ranks. Yields a function to call when all have started, which forwards the signals
    that came before."""
    missed: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if any(process.pid is None for process in ranks):
            missed.append(number)
            return
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, number)

    def forward_missed() -> None:
        for number in missed:
            forward(number, None)

    before = {number: signal.signal(number, forward) for number in signals}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield forward_missed
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
    os.setpgid(0, 0)  # ctrl-C of a terminal reaches only the launcher, which forwards it once
    os.environ[OWN_LAUNCHER] = str(parent)
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(rank), str(world)
    signal.set_wakeup_fd(-1)
    if signals is None:  # a forked rank has the launcher's handlers
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
        signals.listen(end_now=ending.end_now, peer_is_gone=ending.peer_is_gone)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if platform.backend == "gloo" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cpus() // _local_ranks(world)))
    platform.device()
    store, rank = connect()
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=timeout_minutes)
    )
    ending.register_peers(store, world)
    code = function(ending.closers)
    mark_done(store, rank)
    dist.destroy_process_group()
    return code


def _file_store(path: str, world: int) -> Store:
    return dist.FileStore(path, world)  # type: ignore[attr-defined]


def _external_store() -> tuple[Store, int]:
    """The store and the rank's number from the environment variables of torchrun or srun."""
    store, rank, _ = next(rendezvous("env://"))
    return store, rank


def available_cpus() -> int:
    """Number of CPUs that this process may use: its affinity mask, limited by the quota of its control group."""
    affinity = len(os.sched_getaffinity(0))
    for quota in _cgroup_quotas():
        affinity = min(affinity, max(1, round(quota)))
    return affinity


def _cgroup_quotas() -> Iterator[float]:
    """Quotas of the process's control group in CPUs, for versions 2 and 1; none if there is no limit."""
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
    """Number of ranks on this machine."""
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0].split(",")[0]
    return int(os.environ.get("LOCAL_WORLD_SIZE") or slurm or world)


def _adopt_slurm_environment() -> None:
    """Set torchrun's environment variables from those of srun. Raises UserError if MASTER_ADDR or MASTER_PORT is
    missing."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name} is not set; before srun, export MASTER_ADDR (the job's first host) and MASTER_PORT"
            )
    for ours, slurms in (
        ("RANK", "SLURM_PROCID"),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        ("LOCAL_RANK", "SLURM_LOCALID"),
    ):
        if ours not in os.environ and slurms in os.environ:
            os.environ[ours] = os.environ[slurms]
