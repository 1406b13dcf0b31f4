"""The lock of a run folder, so that two runs never write to the same one."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from echorl_nemo.errors import UserError

LOCK_FILE = ".lock"
RESTART_PATIENCE_SECONDS = 90.0
"""Time that a requeued job waits for the lock: the file server may still hold that of a lost node."""


class RunLock:
    """A POSIX lock on a file of the run folder. It ends with its process, and works over NFS."""

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises UserError if another process has it, which is named, or if the file system has no
        locks."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            self._lock(RESTART_PATIENCE_SECONDS if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else 0.0)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            owner = self._file.read().strip()
            raise UserError(
                f"trainer.run_dir={folder}: another run writes there ({owner}); wait for its end, or name another "
                "folder"
            ) from error
        except OSError as error:
            raise UserError(
                f"trainer.run_dir={folder}: its file system has no locks ({error}), so that a second run in the folder "
                "would not be noticed; mount it with locks (Lustre: -o flock), or name another folder"
            ) from error
        self._file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}\n")
        self._file.flush()

    def _lock(self, patience_seconds: float) -> None:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def release(self) -> None:
        """Give the lock back."""
        self._file.close()
