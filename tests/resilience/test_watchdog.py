import faulthandler
import json
import time
from pathlib import Path

import pytest

from echorl_nemo.resilience.watchdog import Watchdog


def _stand_still(stacks: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Wait until the stacks are written and the message is printed, by two threads in any order. Returns the output."""
    deadline, printed = time.monotonic() + 60, ""
    while not (stacks.stat().st_size and printed):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        printed += capfd.readouterr().out
    return printed


def test_a_long_step_leaves_its_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    watches = [Watchdog(tmp_path, rank, limit_seconds=0.2) for rank in (1, 0)]  # one timer a process: the last one's
    for watchdog in watches:
        watchdog.start_step(6)
    printed = _stand_still(tmp_path / "stacks" / "rank-0000.txt", capfd)
    for watchdog in watches:
        watchdog.close()
    stacks = (tmp_path / "stacks" / "rank-0000.txt").read_text()
    assert "Timeout (0:00:00.200000)!" in stacks and "_stand_still" in stacks
    assert not (tmp_path / "stacks" / "rank-0001.txt").exists()
    assert "step 7 takes longer than 0.00333333 minutes" in printed


def test_steps_in_time_leave_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step starts its time again."""
    calls: list[str] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda limit, file: calls.append(f"armed for {limit}"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("disarmed"))
    watchdog = Watchdog(tmp_path, 0, limit_seconds=60.0)
    for step in range(3):
        watchdog.start_step(step)
    watchdog.close()
    assert calls == [*(["disarmed", "armed for 60.0"] * 3), "disarmed"]
    assert not (tmp_path / "stacks").exists() and capfd.readouterr().out == ""


def test_the_heartbeat_says_where_the_run_is(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, limit_seconds=0)
    watchdog.start_step(3)
    watchdog.heartbeat("generate")
    heartbeat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (heartbeat["step"], heartbeat["phase"]) == (3, "generate") and heartbeat["time"] == pytest.approx(
        time.time(), abs=60
    )
    Watchdog(tmp_path, 1, limit_seconds=0).heartbeat("verify")  # only the main rank writes it
    Watchdog(None, 0, limit_seconds=0).heartbeat("verify")
    assert json.loads((tmp_path / "heartbeat.json").read_text()) == heartbeat
