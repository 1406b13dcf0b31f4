"""What a person looks at when a run stands still: a heartbeat file, and the stacks of every rank."""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO

from echorl_nemo.resilience.disk import is_full

HEARTBEAT_FILE = "heartbeat.json"
STACKS_FOLDER = "stacks"


class Watch:
    """Of one rank. Beats at every phase of a step; a step that takes too long has its stacks written down, by a thread
    of faulthandler's that needs no interpreter."""

    def __init__(self, folder: Path | None, rank: int, *, limit_seconds: float) -> None:
        """``folder``: of the run; None writes nothing. ``limit_seconds`` of a step; 0 is off."""
        self.folder, self.rank, self.limit = folder, rank, limit_seconds
        self._stacks: IO[str] | None = None
        self._step = -1
        self._teller: threading.Timer | None = None
        if folder is not None and limit_seconds:
            path = folder / STACKS_FOLDER / f"rank-{rank:04d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = path.open("a", encoding="utf-8")

    def step(self, step: int) -> None:
        """A step begins: its time starts."""
        self._step = step
        self._disarm()
        if self._stacks is not None:
            faulthandler.dump_traceback_later(self.limit, file=self._stacks)
            if self.rank == 0:
                self._teller = threading.Timer(self.limit, self._tell)
                self._teller.daemon = True
                self._teller.start()

    def rest(self) -> None:
        """No step is timed until the next begins."""
        self._disarm()

    def beat(self, phase: str) -> None:
        """A phase begins. The main rank says so in `run_dir`/heartbeat.json."""
        if self.folder is not None and self.rank == 0:
            beat = {
                "step": self._step,
                "phase": phase,
                "time": time.time(),
                "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "host": socket.gethostname(),
                "process": os.getpid(),
            }
            partial = self.folder / f"{HEARTBEAT_FILE}.new"
            try:
                partial.write_text(json.dumps(beat) + "\n", encoding="utf-8")
                partial.replace(self.folder / HEARTBEAT_FILE)
            except OSError as error:
                if is_full(error):
                    raise
                logging.getLogger(__name__).warning("no heartbeat: %s", error)  # no reason to end a run

    def close(self) -> None:
        """Stop watching; a file that nothing was written to goes."""
        self._disarm()
        if self._stacks is not None:
            path = Path(self._stacks.name)
            self._stacks.close()
            self._stacks = None
            if path.stat().st_size == 0:
                path.unlink()
                with contextlib.suppress(OSError):  # other ranks' are still there
                    path.parent.rmdir()

    def _disarm(self) -> None:
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
        if self._teller is not None:
            self._teller.cancel()
            self._teller = None

    def _tell(self) -> None:
        print(
            f"step {self._step + 1} takes longer than {self.limit / 60:g} minutes "
            "(resilience.step_limit_minutes): every rank writes where it is to the run folder's stacks/",
            flush=True,
        )
