"""The watchdog of a rank: a heartbeat file that names the current phase, and stacks of steps that take too long."""

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


class Watchdog:
    """Writes a heartbeat file at every phase of a step. If a step takes too long, faulthandler writes the rank's stacks
    to a file, from a thread that needs no interpreter."""

    def __init__(self, folder: Path | None, rank: int, *, limit_seconds: float) -> None:
        """``folder``: the run folder; None writes nothing. ``limit_seconds``: time limit of a step; 0 is off."""
        self.folder, self.rank, self.limit = folder, rank, limit_seconds
        self._stacks: IO[str] | None = None
        self._step = -1
        self._message_timer: threading.Timer | None = None
        if folder is not None and limit_seconds:
            path = folder / STACKS_FOLDER / f"rank-{rank:04d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = path.open("a", encoding="utf-8")

    def start_step(self, step: int) -> None:
        """Start to measure the time of ``step``."""
        self._step = step
        self._disarm()
        if self._stacks is not None:
            faulthandler.dump_traceback_later(self.limit, file=self._stacks)
            if self.rank == 0:
                self._message_timer = threading.Timer(self.limit, self._print_slow_step)
                self._message_timer.daemon = True
                self._message_timer.start()

    def disarm(self) -> None:
        """Stop to measure the time until the next step starts."""
        self._disarm()

    def heartbeat(self, phase: str) -> None:
        """Note the beginning of a phase. The main rank writes it to `run_dir`/heartbeat.json."""
        if self.folder is not None and self.rank == 0:
            heartbeat = {
                "step": self._step,
                "phase": phase,
                "time": time.time(),
                "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "host": socket.gethostname(),
                "process": os.getpid(),
            }
            partial = self.folder / f"{HEARTBEAT_FILE}.new"
            try:
                partial.write_text(json.dumps(heartbeat) + "\n", encoding="utf-8")
                partial.replace(self.folder / HEARTBEAT_FILE)
            except OSError as error:
                if is_full(error):
                    raise
                logging.getLogger(__name__).warning("the heartbeat file cannot be written: %s", error)

    def close(self) -> None:
        """End the watchdog, and remove the file of stacks if it is empty."""
        self._disarm()
        if self._stacks is not None:
            path = Path(self._stacks.name)
            self._stacks.close()
            self._stacks = None
            if path.stat().st_size == 0:
                path.unlink()
                with contextlib.suppress(OSError):  # the folder holds files of other ranks
                    path.parent.rmdir()

    def _disarm(self) -> None:
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
        if self._message_timer is not None:
            self._message_timer.cancel()
            self._message_timer = None

    def _print_slow_step(self) -> None:
        print(
            f"step {self._step + 1} takes longer than {self.limit / 60:g} minutes "
            "(resilience.step_limit_minutes): every rank writes its stacks to stacks/ in the run folder",
            flush=True,
        )
