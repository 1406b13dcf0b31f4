"""Helper processes that do not outlive the rank that started them."""

import contextlib
import ctypes
import os
import signal

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""prctl(2), Linux."""


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends. ``parent``: the process that started it, which may be gone
    already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Have the processes whose parent ends become children of this one, so that it can end them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_orphans() -> None:
    """Kill the adopted children whose session leader is gone: what a verifier forked in a worker that has ended."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess, ChildProcessError):
            if not psutil.pid_exists(os.getsid(child.pid)):
                child.kill()
                os.waitpid(child.pid, 0)


def end_descendants() -> None:
    """Kill every process that this one started, directly or not."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
