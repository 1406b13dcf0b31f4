"""Ctrl-C and its like, as a person meets them: on processes of the program's own."""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from echorl_nemo.report.logger import read_lines
from echorl_nemo.resilience.stop import EXIT_REQUEUE

SETTINGS = [
    "trainer.steps=400", "trainer.prompts_per_step=4", "trainer.minibatch_prompts=4", "trainer.micro_batch_size=8",
    "rollout.group_size=4", "rollout.max_new_tokens=16", "data.eval=null", "logger.tensorboard=false",
]  # fmt: skip


def start(run: Path, in_repository: Path, *overrides: str) -> subprocess.Popen[str]:
    """A training of many steps, in a process group of its own, as a terminal has it."""
    command = [sys.executable, "-m", "echorl_nemo", "train", "--config-name", "quickstart", *SETTINGS, *overrides]
    return subprocess.Popen(
        [*command, f"trainer.run_dir={run}"], cwd=in_repository, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def until_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in read_lines(run / "metrics.jsonl")):
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "overrides"),
    [
        (signal.SIGINT, ["parallel=tensor2"]),
        (signal.SIGHUP, ["parallel=single"]),
        (signal.SIGTERM, ["parallel=single"]),
    ],
    ids=["INT", "HUP", "TERM"],
)
def test_a_run_that_is_asked_to_stop_can_go_on(
    in_repository: Path, tmp_path: Path, number: signal.Signals, overrides: list[str]
) -> None:
    """The step is finished and saved, the report written, and the command that is printed goes on."""
    run = tmp_path / "run"
    process = start(run, in_repository, *overrides)
    until_step(run, 1)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_REQUEUE, output
    assert "Traceback" not in output and output.count(f": {number.name}; saved, exit code 75") == 1
    made = read_lines(run / "metrics.jsonl")[-1]["step"] + 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{made:06d}"]
    assert "EchoRL run" in (run / "report.html").read_text()
    (line,) = [line for line in output.splitlines() if line.startswith("to go on: ")]
    words = line.removeprefix("to go on: echorl-nemo ").split()
    done = subprocess.run(
        [sys.executable, "-m", "echorl_nemo", *words, f"trainer.steps={made + 1}", "trainer.export=false"],
        cwd=in_repository, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == list(range(made + 1))


def test_the_second_ctrl_c_ends_at_once(in_repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a verifier that hangs keeps the step from its end
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}a+1", "answer": "4"}) + "\n" for n in range(1, 5)))
    process = start(
        run, in_repository, "parallel=tensor2", f"data.train={data}", "data.reward_timeout=600",
        "data.reward=tests.rewards.verifiers:hangs_on_four",
    )  # fmt: skip
    deadline = time.monotonic() + 240
    heartbeat = run / "heartbeat.json"
    while not (heartbeat.is_file() and '"verify"' in heartbeat.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)  # two presses, not one that is counted twice
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output.count("error: interrupted twice: the steps since the last checkpoint are lost") == 1
    assert "Traceback" not in output


def test_ctrl_c_before_the_ranks_writes_nothing(
    in_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run is checked, here while a verifier of your own is imported."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    (tmp_path / "slow_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(run, in_repository, "parallel=single", "data.reward=slow_import:verify")
    deadline = time.monotonic() + 240
    while not mark.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[-1]) == (1, "interrupted")
    assert not run.exists() and "Traceback" not in output


def test_ctrl_c_ends_an_evaluation(in_repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "echorl_nemo", "evaluate", "model.path=examples/tiny_chain/made/model",
        "data.eval=examples/tiny_chain/made/eval.jsonl", "data.reward=exact_line", "evaluation.samples=64",
        "evaluation.k=[1]", "rollout.max_new_tokens=60", "rollout.batch_size=16", "parallel.device=cpu",
        f"evaluation.out={tmp_path / 'out.json'}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=in_repository, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "heartbeat.json").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[-1]) == (1, "interrupted") and "Traceback" not in output


def test_a_terminal_that_hangs_up_costs_nothing(in_repository: Path, tmp_path: Path) -> None:
    """As an ssh connection that breaks: SIGHUP, and nobody reads what is printed. Verifier workers live."""
    run = tmp_path / "run"
    master, terminal = pty.openpty()
    command = [
        sys.executable, "-m", "echorl_nemo", "train", "--config-name", "quickstart", *SETTINGS, "parallel=single",
        "data.reward=math", f"trainer.run_dir={run}",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=in_repository, start_new_session=True, stdin=terminal, stdout=terminal, stderr=terminal,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    reader = threading.Thread(target=_read_until_it_closes, args=(master,), daemon=True)
    reader.start()
    until_step(run, 1)
    os.close(master)
    assert process.wait(timeout=120) == EXIT_REQUEUE
    made = read_lines(run / "metrics.jsonl")[-1]["step"] + 1
    assert (run / "checkpoints" / f"step-{made:06d}").is_dir() and (run / "report.html").is_file()


def _read_until_it_closes(master: int) -> None:
    with contextlib.suppress(OSError):
        while select.select([master], [], [], 0.2) and os.read(master, 4096):
            pass


def test_a_pipe_without_a_reader_costs_nothing(in_repository: Path, tmp_path: Path) -> None:
    """As `echorl-nemo train ... | head -2`."""
    run = tmp_path / "run"
    process = start(run, in_repository, "parallel=single", "trainer.steps=6", "trainer.export=false")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=240) == 0
    assert (run / "checkpoints" / "step-000006").is_dir()
