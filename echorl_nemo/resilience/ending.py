"""The end of a rank: it prints the cause first and once, closes what was started, and ends the process.

Processes that a library started cannot prevent it: they are killed, and the interpreter's own shutdown, which would
wait for them, is skipped.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from echorl_nemo.errors import UserError, first_line, print_error
from echorl_nemo.resilience.orphans import kill_descendants
from echorl_nemo.resilience.streams import tolerate_closed_output

CLOSE_SECONDS = 10.0
"""Time limit for closing; after it the process ends anyway."""
STORE_SECONDS = 3.0
"""Time limit for an answer of the ranks' store, whose rank may have ended."""
PEER_SECONDS = 3.0
"""Time that a rank which lost a peer waits for the peer or the launcher to print the cause."""
CAUSE_KEY = "echorl/cause"
Store = Any
"""torch.distributed.Store, which its stubs do not name."""


def is_communication_error(error: BaseException) -> bool:
    """Whether an error says that a collective failed, because a peer has ended or did not answer in time."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection closed"))


class RankEnding:
    """Ends a rank. Every way out of a rank goes through it."""

    def __init__(self, rank: int) -> None:
        tolerate_closed_output()  # printing must not fail if nobody reads the output any more
        self.rank = rank
        self.closers = ExitStack()
        """Callbacks that close what the rank started; they run in reverse order."""
        self._store: Store | None = None
        self._peers: dict[int, tuple[str, int]] = {}
        self._world = 1
        self._ending = threading.Lock()

    def register_peers(self, store: Store, world: int) -> None:
        """Exchange process ids with the other ranks through ``store``, so that a peer that has ended is noticed."""
        own = (socket.gethostname(), os.getpid())
        store.set(_process_key(self.rank), json.dumps(own))
        values = store.multi_get([_process_key(rank) for rank in range(world)])
        peers = {rank: tuple(json.loads(value)) for rank, value in enumerate(values) if rank != self.rank}
        # containers of one host may not see each other's processes
        self._peers = {rank: peer for rank, peer in peers.items() if peer[0] == own[0] and _lives(peer[1])}
        self._store, self._world = store, world

    def run(self, work: Callable[[ExitStack], int]) -> NoReturn:
        """Run ``work`` and end the process with the exit code that it returns, or with 1 if it raises."""
        try:
            code = work(self.closers)
        except BaseException as error:  # noqa: BLE001  whatever it is, it is printed here, and the process ends
            code = 1
            self._print_cause(error)
        self._end(code)

    def end_now(self, why: str) -> None:
        """End the process from another thread. ``why`` is printed as the cause; if empty, the peer that has ended."""
        if self._ending.acquire(blocking=False):
            self._print_once(why or self._gone_peers())
            _kill_and_exit(1)
        threading.Event().wait()  # the end is under way

    def peer_is_gone(self) -> bool:
        """Whether the process of a rank on this host has ended."""
        return any(not _lives(process) for _, process in self._peers.values())

    def _print_cause(self, error: BaseException) -> None:
        if self._world > 1 and is_communication_error(error):
            deadline = time.monotonic() + PEER_SECONDS
            while time.monotonic() < deadline and not self.peer_is_gone():
                time.sleep(0.1)
            time.sleep(0.5 if self.peer_is_gone() else 0.0)  # the launcher or the peer itself prints the cause
            if self.peer_is_gone():
                self._print_once(self._gone_peers())
                return
            self._print_once(
                f"rank {self.rank} on {socket.gethostname()} lost the other ranks: one of them hangs or has ended, or "
                f"the network is broken (trainer.timeout_minutes is how long one may take): "
                f"{first_line(error) or type(error).__name__}",
                error,
            )
            return
        if not self._is_first_to_print():
            return
        if isinstance(error, UserError):
            print_error(error)
        else:
            print(f"rank {self.rank} on {socket.gethostname()} failed:", file=sys.stderr)
            traceback.print_exception(error)
        sys.stderr.flush()

    def _print_once(self, why: str, error: BaseException | None = None) -> None:
        if why and self._is_first_to_print():
            print(f"error: {why}", file=sys.stderr, flush=True)
            if error is not None:
                traceback.print_exception(error)

    def _gone_peers(self) -> str:
        """A sentence about the ranks of this host that have ended; empty if this program's launcher prints that."""
        if OWN_LAUNCHER in os.environ:
            return ""
        gone = [f"rank {rank} (process {process} on {host})" for rank, (host, process) in self._peers.items()
                if not _lives(process)]  # fmt: skip
        return f"{', '.join(gone)} ended without a word: rank {self.rank} cannot go on" if gone else ""

    def _is_first_to_print(self) -> bool:
        """Whether no other rank has printed a cause. True also if the store does not answer."""
        if self._store is None:
            return True
        answers: list[int] = []
        asking = threading.Thread(target=_count_up, args=(self._store, answers), daemon=True)
        asking.start()
        asking.join(STORE_SECONDS)
        return not answers or answers[0] == 1

    def _end(self, code: int) -> NoReturn:
        self._ending.acquire()
        late = threading.Timer(CLOSE_SECONDS, _kill_and_exit, [code or 1])
        late.daemon = True
        late.start()
        try:
            self.closers.close()
        except BaseException as error:  # noqa: BLE001  the process ends either way
            if code == 0:
                code = 1
                self._print_cause(error)
            else:
                print(f"warning: while rank {self.rank} was closed: {error!r}", file=sys.stderr)
        _kill_and_exit(code)


OWN_LAUNCHER = "ECHORL_OWN_LAUNCHER"
"""Environment variable of ranks that this program started. Their launcher prints which rank ended without a cause."""


def mark_done(store: Store, rank: int) -> None:
    """Note in ``store`` that a rank ends because its work is done."""
    store.set(_done_key(rank), "1")


def is_done(store: Store, rank: int) -> bool:
    """Whether `mark_done` was called for a rank."""
    return bool(store.check([_done_key(rank)]))


def _done_key(rank: int) -> str:
    return f"echorl/done/{rank}"


def cause_was_printed(store: Store) -> bool:
    """Whether a rank has printed the cause of the run's end."""
    return bool(store.add(CAUSE_KEY, 0))


def _count_up(store: Any, answers: list[int]) -> None:
    try:
        answers.append(store.add(CAUSE_KEY, 1))
    except (RuntimeError, OSError):  # the rank that holds the store has ended
        return


def _process_key(rank: int) -> str:
    return f"echorl/process/{rank}"


def _lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill_and_exit(code: int) -> NoReturn:
    kill_descendants()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
