import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from echorl_nemo.errors import UserError
from echorl_nemo.resilience.lock import RunLock


def _hold(folder: Path, ready: Connection) -> None:
    lock = RunLock(folder)
    ready.send("held")
    ready.recv()
    lock.release()


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    owner = fork.Process(target=_hold, args=(tmp_path / "run", theirs))
    owner.start()
    assert ours.recv() == "held"
    with pytest.raises(UserError, match=rf"trainer.run_dir=.*: another run writes there \(process {owner.pid} on "):
        RunLock(tmp_path / "run")
    owner.kill()  # no time to clean up
    owner.join()
    RunLock(tmp_path / "run").release()
    assert f"process {os.getpid()} on " in (tmp_path / "run" / ".lock").read_text()
