"""What to run first on a node with TensorRT-LLM: the probe's check, then ten training steps with its rollouts.

    python -m benchmarks.gpu.trtllm OUT --model Qwen/Qwen2.5-Math-1.5B       # writes OUT/trtllm.json

The problems are sums, so that no data has to be downloaded. Of each step it keeps `rollout.entropy_gap` and
`rollout.logprob_gap`, the differences between the engine's numbers and the policy's scoring pass, and the speed. It
ends with 1 if the probe is wrong, or if a step is missing or its gaps are not finite. Has run only against the tests'
stub. More arguments are overrides of the training: `parallel.tensor=2`.
"""

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.training import steps_of
from echorl_nemo.report.config import METRICS_FILE
from echorl_nemo.shipped import ROOT

STEPS = 10
KEPT = ("rollout.entropy_gap", "rollout.logprob_gap", "reward", "response_length", "tokens_per_second", "time.generate")
Runner = Callable[[str, Sequence[str]], int]
"""Runs a module with arguments; returns the exit code."""


def as_process(module: str, arguments: Sequence[str]) -> int:
    """`python -m MODULE ARGUMENTS` in the repository."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode


def write_sums(path: Path, count: int) -> None:
    """Write ``count`` sums of two numbers below 1000, as JSONL."""
    generator = random.Random(0)
    pairs = [(generator.randrange(1000), generator.randrange(1000)) for _ in range(count)]
    rows = [
        {"prompt": f"What is {a} + {b}? Put the answer into \\boxed{{}}.\n", "answer": str(a + b)} for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None, run: Runner = as_process) -> int:
    """Run both checks with ``run`` and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="Hugging Face folder or id")
    parser.add_argument("--data", help="JSONL with prompt and answer, instead of sums")
    parser.add_argument("--new-tokens", type=int, default=512, help="of a response")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = options.data
    if data is None:
        data = out / "sums.jsonl"
        write_sums(data, 256)

    probe_file, run_dir = out / "probe.json", out / "run"
    probe = ["--model", options.model, "--new-tokens", str(options.new_tokens), "--json", str(probe_file)]
    probe_code = run("benchmarks.trtllm_probe", probe)
    train_code = run(
        "echorl_nemo",
        [
            "train", "rollout=trtllm", f"model.path={options.model}", f"data.train={data}",
            f"trainer.run_dir={run_dir}",
            f"trainer.steps={STEPS}", "trainer.prompts_per_step=16", "trainer.minibatch_prompts=16",
            "trainer.export=false", f"rollout.max_new_tokens={options.new_tokens}", "rollout.group_size=8",
            "echorl.entropy_source=rollout", *options.overrides,
        ],
    )  # fmt: skip
    rows = steps_of(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    steps: list[dict[str, Any]] = [{name: row.get(name) for name in KEPT} for row in rows]
    gaps = [step[name] for step in steps for name in KEPT[:2]]
    finite = all(gap is not None and math.isfinite(gap) for gap in gaps)
    right = probe_code == 0 and train_code == 0 and len(steps) == STEPS and finite
    found = {
        "right": right,
        "probe": {
            "exit_code": probe_code,
            "figures": json.loads(probe_file.read_text()) if probe_file.is_file() else None,
        },
        "training": {"exit_code": train_code, "steps": steps},
    }
    (out / "trtllm.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for number, step in enumerate(steps, 1):
        print(f"step {number}: entropy_gap {step[KEPT[0]]} logprob_gap {step[KEPT[1]]}")
    print("right" if right else f"WRONG: probe {probe_code}, training {train_code}, {len(steps)} of {STEPS} steps")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
