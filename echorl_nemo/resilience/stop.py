"""Stopping in time: signals that ask for it, and the end of the job."""

import os
import signal
import time
from dataclasses import dataclass, field
from types import FrameType

from echorl_nemo.resilience.config import ResilienceConfig

EXIT_REQUEUE = 75
"""Exit code of a run that saved and wants to be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether this rank was asked to stop. A signal only sets a flag, which is looked at between steps."""

    config: ResilienceConfig
    deadline: float | None
    """When the job ends, seconds since the epoch."""
    received: str = ""
    """Name of the first signal that came."""
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds of the longest `step` and `save` so far."""

    def listen(self) -> None:
        """Take SIGUSR1 and SIGTERM from now on."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def took(self, what: str, seconds: float) -> None:
        """Learn how long a `step` or a `save` takes."""
        self.longest[what] = max(seconds, self.longest.get(what, 0.0))

    def reason(self) -> str:
        """Why this rank wants to stop now; empty if it does not."""
        if self.received:
            return self.received
        if self.deadline is not None and time.time() + self._margin() > self.deadline:
            return f"the job ends in {max(0.0, self.deadline - time.time()):.0f} s"
        return ""

    def _margin(self) -> float:
        step, save = self.longest.get("step", 0.0), self.longest.get("save", 0.0)
        return 60 * self.config.time_margin_minutes + 1.5 * step + 2 * save

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


def job_deadline(config: ResilienceConfig) -> float | None:
    """When this job ends, seconds since the epoch; None where that is not known."""
    if config.time_limit_minutes:
        start = float(os.environ.get("SLURM_JOB_START_TIME", time.time()))
        return start + 60 * config.time_limit_minutes
    end = os.environ.get("SLURM_JOB_END_TIME")
    return float(end) if end else None
