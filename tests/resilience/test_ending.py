import fcntl
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from echorl_nemo.engines.megatron import launch as launching
from echorl_nemo.engines.megatron.launch import available_cpus, launch
from echorl_nemo.errors import UserError
from echorl_nemo.resilience.ending import is_communication_error
from tests.engines.megatron.helpers import PLATFORM


def test_errors_of_collectives_are_known() -> None:
    assert is_communication_error(
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed by peer")
    )
    assert is_communication_error(dist.DistBackendError("NCCL error"))
    assert is_communication_error(ConnectionResetError("reset"))
    assert not is_communication_error(RuntimeError("inline_container.cc: unexpected pos"))
    assert not is_communication_error(OSError("No space left on device"))


def test_what_a_killed_launcher_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, alive, other = (tmp_path / name for name in ("echorl-dead", "echorl-alive", "echorl-without-a-lock"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "rendezvous").write_text("")
    for folder in (dead, alive):
        (folder / "lock").write_text("")
    with (alive / "lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert launch(lambda _: 0, 2, PLATFORM, timeout_minutes=1) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["echorl-alive", "echorl-without-a-lock"]


def test_threads_are_those_of_the_environment_or_of_the_cpus_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OMP_NUM_THREADS is respected; without it the CPUs of the affinity mask and of the cgroup are shared."""

    def rank(_: object) -> int:
        (tmp_path / str(dist.get_rank())).write_text(str(torch.get_num_threads()))
        return 0

    def threads() -> list[int]:
        assert launch(rank, 2, PLATFORM, timeout_minutes=1) == 0
        return [int((tmp_path / str(number)).read_text()) for number in range(2)]

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads() == [before] * 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launching, "available_cpus", lambda: 6)
    assert threads() == [3, 3]


def test_cpus_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(launching, "_cgroup_quotas", lambda: iter([2.0]))
    assert available_cpus() == 2
    monkeypatch.setattr(launching, "_cgroup_quotas", lambda: iter([]))
    assert available_cpus() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert available_cpus() == 1


def test_the_error_comes_before_what_is_closed_and_once(capfd: pytest.CaptureFixture[str]) -> None:
    def closing() -> None:
        print("closed", file=sys.stderr)

    def rank(closers: object) -> int:
        closers.callback(closing)  # type: ignore[attr-defined]
        raise UserError("trainer.x=1 is wrong; use 2")

    assert launch(rank, 1, PLATFORM, timeout_minutes=1) == 1
    assert capfd.readouterr().err.splitlines() == ["error: trainer.x=1 is wrong; use 2", "closed"]
    assert launch(rank, 2, PLATFORM, timeout_minutes=1) == 1
    assert capfd.readouterr().err.count("error: trainer.x=1 is wrong; use 2\n") == 1


def test_a_rank_that_ends_with_0_before_it_is_done_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    def rank(_: object) -> int:
        if dist.get_rank() == 1:
            os._exit(0)
        dist.barrier()
        return 0

    assert launch(rank, 2, PLATFORM, timeout_minutes=1) == 1
    assert re.fullmatch(r"error: rank 1 \(process \d+\) ended with exit code 0\n", capfd.readouterr().err)


def test_helpers_of_a_process_without_its_session_leader_are_no_orphans(tmp_path: Path) -> None:
    """As under nohup, when the shell has gone."""
    program = (
        "import os, subprocess, sys, time\n"
        "if os.fork():\n"
        "    os._exit(0)\n"  # the session leader
        "time.sleep(0.2)\n"
        "from echorl_nemo.resilience.orphans import adopt_orphans, kill_orphans\n"
        "adopt_orphans()\n"
        "helper = subprocess.Popen(['sleep', '60'])\n"
        "kill_orphans()\n"
        "open(sys.argv[1], 'w').write(str(helper.poll()))\n"
        "helper.kill()\n"
    )
    mark = tmp_path / "mark"
    subprocess.run([sys.executable, "-c", program, str(mark)], start_new_session=True, check=True)
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert mark.read_text() == "None"


def test_a_closer_that_hangs_does_not_keep_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echorl_nemo.resilience.ending.CLOSE_SECONDS", 0.5)

    def rank(closers: object) -> int:
        reader, _ = os.pipe()
        closers.callback(os.read, reader, 1)  # type: ignore[attr-defined]
        return 0

    assert launch(rank, 1, PLATFORM, timeout_minutes=1) == 1
