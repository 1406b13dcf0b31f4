"""Helper processes that do not outlive the rank that started them."""

import contextlib
import ctypes
import os
import signal

import psutil

ORPHAN_MARK = "ECHORL_STARTED_BY_A_VERIFIER"
"""Environment variable of what a verifier starts."""
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


def mark_what_follows() -> None:
    """Have the programs that this process starts from now on known to `end_orphans`, whatever session they are in."""
    os.environ[ORPHAN_MARK] = "1"


def end_orphans() -> None:
    """Kill what the helpers of this process that have ended left behind: adopted children that are marked, or of
    another session whose leader is gone."""
    own_session = os.getsid(0)
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            session = os.getsid(child.pid)
            left = session != own_session and not psutil.pid_exists(session)
            if left or ORPHAN_MARK in child.environ():
                for process in (*child.children(recursive=True), child):
                    process.kill()
                child.wait(timeout=5)


def end_descendants() -> None:
    """Kill every process that this one started, directly or not."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
