"""Training runs of the native engine, each started as a user starts it, for `benchmarks.gpu.run`.

    python -m benchmarks.gpu.training quickstart WORK [--small]

writes WORK/quickstart.json. The kinds: `quickstart`, the embedded task; `long`, a random model of half a billion
parameters with responses of 4096 tokens; `resume`, SIGKILL after a checkpoint, then resuming; `oom`, a step that needs
more memory than any GPU has. It ends with 1 if the run does not do what is expected. ``--small``: sizes for a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import kill_group, start_in_group
from benchmarks.gpu.random_model import HALF_BILLION, SMALL, make_model, make_prompts
from echorl_nemo.report.config import METRICS_FILE
from echorl_nemo.report.logger import read_lines
from echorl_nemo.resilience.checkpoints import CheckpointFolder, step_of
from echorl_nemo.shipped import ROOT

ONE_RANK = ("parallel.device=auto", "parallel.tensor=1", "logger.tensorboard=false")
COMPARED = ("loss", "policy_loss", "reward", "entropy", "grad_norm")
POLL_SECONDS = 0.05


class WrongRunError(Exception):
    """A run that does not do what is expected of it."""


def quickstart(work: Path, small: bool) -> dict[str, Any]:
    """The embedded task on one rank."""
    run_dir = work / "runs" / "quickstart"
    _run("quickstart", f"trainer.run_dir={run_dir}", *ONE_RANK, f"trainer.steps={3 if small else 20}")
    rows = steps_of(run_dir)
    evaluations = [row["eval.accuracy"] for row in read_lines(run_dir / METRICS_FILE) if "eval.accuracy" in row]
    return {
        "steps": len(rows),
        "accuracy": [evaluations[0], evaluations[-1]],
        "last_step": _speed(rows[-1], rollouts=128),
        "largest_logprob_gap": max(row["rollout.logprob_gap"] for row in rows),
        "largest_entropy_gap": max(row["rollout.entropy_gap"] for row in rows),
    }


def long(work: Path, small: bool) -> dict[str, Any]:
    """Long responses of a random model: speed and memory of a step against what `echorl-nemo plan` estimates."""
    shape, tokens, prompts, group = (SMALL, 64, 2, 4) if small else (HALF_BILLION, 4096, 4, 8)
    model, data, run_dir = work / "model", work / "prompts.jsonl", work / "runs" / "long"
    make_model(model, shape, positions=tokens + 64)
    make_prompts(data, shape, prompts)
    overrides = [
        f"model.path={model}", f"data.train={data}", "data.reward=exact_line", "data.max_prompt_tokens=32",
        # all responses are wrong, of which the estimator by itself learns nothing
        "algo.degenerate=zvp", f"rollout.max_new_tokens={tokens}", f"rollout.group_size={group}",
        f"rollout.batch_size={prompts * group}", f"trainer.prompts_per_step={prompts}",
        f"trainer.minibatch_prompts={prompts}", "trainer.micro_batch_size=1", "trainer.recompute=selective",
        "trainer.steps=1", "trainer.export=false", "parallel.pipeline=1", *ONE_RANK,
    ]  # fmt: skip
    planned = json.loads(
        subprocess.run(
            [sys.executable, "-m", "echorl_nemo", "plan", "--json", *overrides],
            cwd=ROOT, stdout=subprocess.PIPE, check=True,
        ).stdout
    )  # fmt: skip
    _run("train", f"trainer.run_dir={run_dir}", *overrides)
    (row,) = steps_of(run_dir)
    memory = planned["memory_gib"][0]
    figures = {
        "parameters": planned["parameters"],
        **_speed(row, rollouts=prompts * group),
        "planned_gib": {"update": memory["update"], "generate": memory["generate"]},
    }
    if "memory.peak" in row:
        figures["peak_gib"] = row["memory.peak"]
        figures["peak_of_planned"] = row["memory.peak"] / max(memory["update"], memory["generate"])
    if not row["grad_norm"] > 0:
        raise WrongRunError(f"grad_norm={row['grad_norm']}: nothing was learnt from")
    return figures


def resume(work: Path, small: bool) -> dict[str, Any]:
    """A run that is killed once its second checkpoint is there, and goes on, against one that is not."""
    steps = 4 if small else 8
    shared = [
        *ONE_RANK, f"trainer.steps={steps}", "trainer.save_every=1", "trainer.prompts_per_step=4", "data.eval=null",
        "trainer.minibatch_prompts=4", "trainer.export=false",
    ]  # fmt: skip
    straight, killed = work / "runs" / "straight", work / "runs" / "killed"
    _run("quickstart", f"trainer.run_dir={straight}", *shared)
    process = start_in_group(_command("quickstart", f"trainer.run_dir={killed}", *shared), sys.stdout.fileno())
    while _saved(killed) < 2 and process.poll() is None:
        time.sleep(POLL_SECONDS)
    kill_group(process)
    at_kill = _saved(killed)
    if not 2 <= at_kill < steps:
        raise WrongRunError(f"the run had {at_kill} of {steps} checkpoints when it was killed; see the log")
    _run("quickstart", f"trainer.run_dir={killed}", *shared, "trainer.resume=true")
    rows, expected = steps_of(killed), steps_of(straight)
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        raise WrongRunError(f"the resumed run has steps {[row['step'] for row in rows]}")
    gaps = [abs(ours[name] - theirs[name]) for ours, theirs in zip(rows, expected, strict=True) for name in COMPARED]
    return {"steps": steps, "killed_after_checkpoint": at_kill, "largest_difference": max(gaps)}


def oom(work: Path, small: bool) -> dict[str, Any]:
    """A micro-batch whose logits need 99 GB: the run must end with the rank's trace, and soon."""
    shape, model, data, run_dir = HALF_BILLION, work / "model", work / "prompts.jsonl", work / "runs" / "oom"
    if not (model / "config.json").is_file():
        make_model(model, shape, positions=4160)
    make_prompts(data, shape, 256)
    command = _command(
        "train", f"trainer.run_dir={run_dir}", f"model.path={model}", "model.verify=off", f"data.train={data}",
        "data.reward=exact_line", "data.max_prompt_tokens=32", "algo.degenerate=zvp", "rollout.max_new_tokens=64",
        "rollout.group_size=16", "rollout.batch_size=1024", "trainer.prompts_per_step=256",
        "trainer.minibatch_prompts=256", "trainer.micro_batch_size=4096", "trainer.steps=1", "parallel.pipeline=1",
        *ONE_RANK,
    )  # fmt: skip
    start = time.monotonic()
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(found.stdout)
    named = "OutOfMemoryError" in found.stdout and "Traceback (most recent call last)" in found.stdout
    if found.returncode == 0 or not named:
        raise WrongRunError(
            f"exit code {found.returncode}; the trace {'names' if named else 'does not name'} the cause"
        )
    return {"exit_code": found.returncode, "seconds": time.monotonic() - start}


KINDS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "quickstart": quickstart, "long": long, "resume": resume, "oom": oom,
}  # fmt: skip


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "echorl_nemo", *arguments]


def _run(*arguments: str) -> None:
    code = subprocess.run(_command(*arguments), cwd=ROOT).returncode
    if code:
        raise WrongRunError(f"echorl-nemo {arguments[0]} ended with {code}")


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of each training step, without those of evaluations."""
    return [row for row in read_lines(run_dir / METRICS_FILE) if "time.step" in row]


def _saved(run_dir: Path) -> int:
    complete = CheckpointFolder(run_dir / "checkpoints").complete()
    return step_of(complete[0]) if complete else 0


def _speed(row: dict[str, Any], *, rollouts: int) -> dict[str, Any]:
    """Response tokens a second of each phase."""
    tokens = row["response_length"] * rollouts
    phases = {phase: row[f"time.{phase}"] for phase in ("generate", "score", "update")}
    return {
        "response_tokens": tokens,
        "seconds": phases,
        "tokens_per_second": {phase: tokens / seconds for phase, seconds in phases.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("work", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        figures = KINDS[options.kind](options.work, options.small)
    except WrongRunError as error:
        print(f"error: {options.kind}: {error}", file=sys.stderr)
        return 1
    (options.work / f"{options.kind}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
