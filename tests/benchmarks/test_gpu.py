"""The scripts for a GPU machine run here in small, and say what that does not show."""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from benchmarks import trtllm_probe
from benchmarks.gpu import trtllm
from benchmarks.gpu.parts import Check, Part
from benchmarks.gpu.run import NOT_REHEARSED, counts
from benchmarks.gpu.wheels import PINS, SOURCES, WHEELS
from echorl_nemo import cli
from tests.rollout import stub_trtllm


def test_every_part_runs_on_a_cpu_in_small(in_repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", str(tmp_path), "--rehearse"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    log = (tmp_path / "gpu.log").read_text()
    assert result.returncode == 0, result.stdout + log[-6000:]
    assert all(f"\n  {line}" in result.stdout for line in NOT_REHEARSED)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rehearsal"] is True and found["not_shown"] == list(NOT_REHEARSED)
    assert found["machine"]["versions"]["megatron-core"]
    parts = found["parts"]
    assert list(parts) == ["ops", "loss_op", "quickstart", "long", "resume", "overhead", "oom"]
    assert parts["oom"]["reason"] == "not run: a CPU has no GPU memory"
    assert parts["ops"]["figures"]["tests"] > 0 and parts["ops"]["figures"]["failures"] == 0
    assert {"ours", "naive", "megatron"} <= parts["loss_op"]["figures"]["cpu_seconds"][0][-1].keys()
    assert parts["quickstart"]["figures"]["largest_logprob_gap"] < 1e-5
    long = parts["long"]["figures"]
    assert long["response_tokens"] == 2 * 4 * 64  # no response stops by itself
    assert set(long["tokens_per_second"]) == {"generate", "score", "update"} and long["planned_gib"]["update"] > 0
    assert parts["resume"]["figures"]["killed_after_checkpoint"] >= 2
    assert parts["resume"]["figures"]["largest_difference"] == 0.0
    assert all(len(seconds) == 1 for seconds in parts["overhead"]["figures"].values())
    assert "=== resume: SIGKILL after a checkpoint, then resuming" in log


def _part(name: str, code: str, limit: float = 60) -> Part:
    return Part(name, "a test", ["-c", code], limit)


def _check(tmp_path: Path, *parts: Part, seconds: float = 60) -> Check:
    return Check(parts, tmp_path, tmp_path / "gpu.json", tmp_path / "gpu.log", {}, seconds)


def test_a_part_that_fails_hangs_or_writes_nothing_does_not_stop_the_others(tmp_path: Path) -> None:
    spawn = "import subprocess; subprocess.run(['sleep', '987.5'], start_new_session=True)"
    unread = Part("unread", "a test", ["-c", "pass"], 60, lambda folder: counts(folder / "missing.xml"))
    check = _check(
        tmp_path, _part("fails", "print('a cause'); raise SystemExit(3)"), _part("hangs", spawn, limit=1.0), unread,
        _part("works", "print('all is well')"),
    )  # fmt: skip
    assert check.run() is False
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [result["ok"] for result in found.values()] == [False, False, False, True]
    assert found["fails"]["reason"] == "exit code 3; see the log"
    assert found["hangs"]["reason"].startswith("ended after 1 seconds")
    assert found["unread"]["reason"].startswith("exit code 0, and its figures cannot be read: FileNotFoundError")
    log = (tmp_path / "gpu.log").read_text()
    assert "a cause" in log and "all is well" in log
    time.sleep(0.2)
    assert not [process for process in psutil.process_iter(["cmdline"]) if "987.5" in (process.info["cmdline"] or [])]


def test_parts_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    check = _check(tmp_path, _part("long", "import time; time.sleep(30)"), _part("late", "pass"), seconds=0.5)
    assert check.run() is False
    assert check.results["late"].reason == "not run: the 0 seconds of all parts are over"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: torch finds no GPU; use --rehearse"),
        (["--rehearse", "--only=opps"], "no part opps; there are ops,"),
    ],
)
def test_what_cannot_run_is_refused(in_repository: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", str(tmp_path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_every_wheel_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in PINS.read_text().splitlines() if "==" in line}
    assert {name.lower() for name in (*WHEELS, *SOURCES)} <= pinned
    assert not {"torch", "triton", "numpy"} & set(WHEELS)  # the machine's own


def _in_this_process(module: str, arguments: Sequence[str]) -> int:
    """With the stub of TensorRT-LLM, which no other process would have."""
    if module == "benchmarks.trtllm_probe":
        return trtllm_probe.main([*arguments, "--requests=8", "--prompt-tokens=20", "--repetitions=1"])
    return cli.main(arguments)


def _rehearse_trtllm(out: Path, task: Path) -> None:
    with stub_trtllm.install():
        arguments = [
            str(out), "--model", str(task / "model"), "--data", str(task / "train.jsonl"), "--new-tokens", "40",
            "data.reward=exact_line", "trainer.prompts_per_step=2", "trainer.minibatch_prompts=2",
            "rollout.group_size=4", "parallel.pipeline=1", "parallel.tensor=1", "parallel.device=cpu",
        ]  # fmt: skip
        sys.exit(trtllm.main(arguments, run=_in_this_process))


def test_the_script_for_tensorrt_llm_runs_against_the_stub(
    in_repository: Path, tiny_chain: Path, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_rehearse_trtllm, args=(tmp_path, tiny_chain))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "trtllm.json").read_text())
    assert found["right"] is True and found["probe"]["figures"]["largest_gap_nats"] < 1e-3
    steps = found["training"]["steps"]
    assert len(steps) == trtllm.STEPS
    for step in steps:
        assert 0 <= step["rollout.entropy_gap"] < 1e-4 and 0 <= step["rollout.logprob_gap"] < 1e-4


def test_a_wrong_training_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(module: str, arguments: Sequence[str]) -> int:
        return int(module == "echorl_nemo")

    assert trtllm.main([str(tmp_path), "--model", "m"], run=fails) == 1
    assert "WRONG: probe 0, training 1, 0 of 10 steps" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert len(rows) == 256 and rows[0]["prompt"].startswith("What is ") and rows[0]["answer"].isdigit()
