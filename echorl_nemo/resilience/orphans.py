"""Ends helper processes with the rank that started them."""

import contextlib
import ctypes
import os
import signal

import psutil

ORPHAN_MARK = "ECHORL_STARTED_BY_A_VERIFIER"
"""Environment variable of the processes that a verifier starts."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""Options of prctl(2) on Linux."""


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends. ``parent``: the id of the process that started it, which may have
    ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Let this process become the parent of its descendants whose own parent has ended (Linux child subreaper), so that
    `kill_orphans` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def mark_child_processes() -> None:
    """Mark the processes that this one starts from now on, so that `kill_orphans` recognises them in any session."""
    os.environ[ORPHAN_MARK] = "1"


def kill_orphans() -> None:
    """Kill the processes that ended helpers of this process left behind: adopted children that are marked, or that
    belong to a session whose leader has ended."""
    own_session = os.getsid(0)
    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            session = os.getsid(child.pid)
            left = session != own_session and not psutil.pid_exists(session)
            if left or ORPHAN_MARK in child.environ():
                for process in (*child.children(recursive=True), child):
                    process.kill()
                child.wait(timeout=5)


def kill_descendants() -> None:
    """Kill every process that this one started, directly or indirectly."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
