"""Decides when a run stops early: on a signal, or shortly before its job ends."""

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
"""Exit code of a run that has saved and has to be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to finish its step, save and end."""

EndNow = Callable[[str], None]
"""Ends the process immediately; the argument is the reason."""


@dataclass
class StopSignals:
    """Receives `SIGNALS` and remembers the first. Forked ranks inherit it."""

    received: str = ""
    """Name of the first signal that came; empty if none has."""

    def listen(self, *, end_now: EndNow | None = None, peer_is_gone: Callable[[], bool] | None = None) -> "StopSignals":
        """Receive `SIGNALS` from now on, on a thread, since a rank that waits in a collective runs no Python handler.

        ``end_now`` is called at a second SIGINT, and at SIGTERM if ``peer_is_gone``: torchrun sends SIGTERM after a
        rank has died, and then no step can be finished.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(
            target=self._watch, args=(reader, end_now, peer_is_gone), name="stop signals", daemon=True
        ).start()
        return self

    def _watch(self, reader: int, end_now: EndNow | None, peer_is_gone: Callable[[], bool] | None) -> None:
        interrupts = 0
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                interrupts += number == signal.SIGINT
                if end_now is not None and interrupts > 1:
                    end_now("interrupted twice: the steps since the last checkpoint are lost")
                if end_now is not None and number == signal.SIGTERM and peer_is_gone and peer_is_gone():
                    end_now("")
                self._receive(number, None)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


@dataclass
class StopRequest:
    """Decides between steps whether this rank asks to stop the run."""

    config: ResilienceConfig
    deadline: float | None
    """End of the job, seconds since the epoch; None if it is not known."""
    signals: StopSignals = field(default_factory=StopSignals)
    longest: dict[str, float] = field(default_factory=dict)
    """Longest duration of a `step` and of a `save` so far, seconds."""
    clock: Callable[[], float] = time.time
    """Returns the time, seconds since the epoch."""

    def record_duration(self, what: str, seconds: float) -> None:
        """Record the duration of a `step` or a `save`. The longest ones decide how early the run stops before its job's
        end."""
        self.longest[what] = max(seconds, self.longest.get(what, 0.0))

    def reason(self) -> str:
        """The reason to stop now; empty if there is none."""
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
def preserve_signal_handlers() -> Iterator[None]:
    """Restore the handlers of `SIGNALS` afterwards, which a library such as Ray may replace meanwhile."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def job_deadline(config: ResilienceConfig) -> float | None:
    """The end of this job, seconds since the epoch; None if it is not known."""
    if config.time_limit_minutes:
        start = float(os.environ.get("SLURM_JOB_START_TIME") or time.time())
        return start + 60 * config.time_limit_minutes
    end = os.environ.get("SLURM_JOB_END_TIME")
    return float(end) if end else None
