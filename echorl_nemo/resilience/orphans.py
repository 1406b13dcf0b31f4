"""Helper processes that do not outlive a rank which was killed."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
"""prctl(2), Linux."""


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends. ``parent``: the process that started it, which may be gone
    already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
