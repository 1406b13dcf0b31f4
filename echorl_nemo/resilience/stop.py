"""Stopping in time: signals that ask for it, and the end of the job."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from echorl_nemo.resilience.config import ResilienceConfig

EXIT_REQUEUE = 75
"""Exit code of a run that saved and wants to be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Each asks a run to finish its step, to save and to end."""

EndAtOnce = Callable[[str], None]
"""Ends the process now; the argument says why."""


@dataclass
class StopSignals:
    """The flag that a signal sets, from the first moment of a process on; ranks that it forks inherit it."""

    received: str = ""
    """Name of the first signal that came."""

    def listen(
        self, *, end_at_once: EndAtOnce | None = None, peer_is_gone: Callable[[], bool] | None = None
    ) -> "StopSignals":
        """Take `SIGNALS` from now on, on a thread: a rank that waits in a collective runs no Python handler.

        ``end_at_once`` is called at a second SIGINT, and at SIGTERM if ``peer_is_gone``: torchrun sends it after a rank
        died, and then no step can be finished.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(
            target=self._watch, args=(reader, end_at_once, peer_is_gone), name="stop signals", daemon=True
        ).start()
        return self

    def _watch(self, reader: int, end_at_once: EndAtOnce | None, peer_is_gone: Callable[[], bool] | None) -> None:
        interrupts = 0
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                interrupts += number == signal.SIGINT
                if end_at_once is not None and interrupts > 1:
                    end_at_once("interrupted twice: what was learnt since the last checkpoint is lost")
                if end_at_once is not None and number == signal.SIGTERM and peer_is_gone and peer_is_gone():
                    end_at_once("")
                self._receive(number, None)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


@dataclass
class StopRequest:
    """Whether this rank wants to stop, which is asked between steps."""

    config: ResilienceConfig
    deadline: float | None
    """When the job ends, seconds since the epoch."""
    signals: StopSignals = field(default_factory=StopSignals)
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds of the longest `step` and `save` so far."""
    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""

    def took(self, what: str, seconds: float) -> None:
        """Learn how long a `step` or a `save` takes."""
        self.longest[what] = max(seconds, self.longest.get(what, 0.0))

    def reason(self) -> str:
        """Why this rank wants to stop now; empty if it does not."""
        if self.signals.received:
            return self.signals.received
        now = self.clock()
        if self.deadline is not None and now + self._margin() > self.deadline:
            return f"the job ends in {max(0.0, self.deadline - now):.0f} s"
        return ""

    def _margin(self) -> float:
        step, save = self.longest.get("step", 0.0), self.longest.get("save", 0.0)
        return 60 * self.config.time_margin_minutes + 1.5 * step + 2 * save


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Whatever a library does with these signals meanwhile, as Ray does, they are this process's again afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def job_deadline(config: ResilienceConfig) -> float | None:
    """When this job ends, seconds since the epoch; None where that is not known."""
    if config.time_limit_minutes:
        start = float(os.environ.get("SLURM_JOB_START_TIME") or time.time())
        return start + 60 * config.time_limit_minutes
    end = os.environ.get("SLURM_JOB_END_TIME")
    return float(end) if end else None
