import os
import signal
import time

import pytest

from echorl_nemo.resilience.config import ResilienceConfig
from echorl_nemo.resilience.stop import SIGNALS, StopRequest, StopSignals, job_deadline


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_only_noted(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    signals = StopSignals()
    stop = StopRequest(ResilienceConfig(), None, signals)
    try:
        signals.listen()
        assert stop.reason() == ""
        os.kill(os.getpid(), number)
        assert stop.reason() == number.name
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_the_margin_grows_with_steps_and_saves() -> None:
    stop = StopRequest(ResilienceConfig(time_margin_minutes=1.0), time.time() + 100)
    assert stop.reason() == ""
    stop.record_duration("step", 20.0)
    stop.record_duration("step", 10.0)  # the longest counts
    assert stop.reason() == ""  # 60 + 30 of 100 s
    stop.record_duration("save", 6.0)
    assert stop.reason().startswith("the job ends in ")


def test_the_end_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert job_deadline(ResilienceConfig()) is None
    assert job_deadline(ResilienceConfig(time_limit_minutes=2)) == pytest.approx(time.time() + 120, abs=5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "2000000000")
    assert job_deadline(ResilienceConfig()) == 2e9
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1000")
    assert job_deadline(ResilienceConfig(time_limit_minutes=2)) == 1120.0
