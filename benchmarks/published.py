"""The plan's step times against published runs of NeMo-RL.

    python -m benchmarks.published           # every run: published, estimated, their ratio
    python -m benchmarks.published --fit     # which constants fit the runs of FITTED best, on a grid

The runs are those on policy of NVIDIA's page docs/about/performance-summary.md (v0.6; Llama and Qwen3-32B v0.4) whose
model the plan counts; their settings are those of examples/configs/recipes/llm/performance. Each is GRPO in bf16 on
H100. The constants of `cluster` are fitted on three of them, and the others are predicted.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from echorl_nemo.config import load_config
from echorl_nemo.engines.megatron.platform import detect_platform
from echorl_nemo.engines.megatron.run import silence_library_warnings
from echorl_nemo.schema import RunConfig

PROMPT_TOKENS = 256
"""Longest prompt that is assumed; the page does not name it."""
FITTED = ("Qwen3-30B-A3B, 32 GPUs", "Qwen3-32B, 32 GPUs", "Qwen3-235B-A22B, 128 GPUs")
GRID = {
    "mfu": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
    "bandwidth_share": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "layer_latency_us": (100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0),
}


@dataclass(frozen=True)
class Published:
    """A published run."""

    name: str
    seconds: float
    """Of a step."""
    length: int
    """Longest sequence, tokens."""
    mean: int
    """Mean sequence, tokens."""
    overrides: tuple[str, ...]

    def config(self, *more: str) -> RunConfig:
        """The run as a configuration of ours."""
        common = [
            "engine=nemo_rl", "algo=nemo_rl", "rollout=vllm", "cluster=h100", "cluster.gpus_per_node=8",
            "data.train=math.jsonl", f"data.max_prompt_tokens={PROMPT_TOKENS}", "rollout.group_size=32",
            "trainer.minibatch_prompts=16", f"rollout.max_new_tokens={self.length - PROMPT_TOKENS}",
            f"rollout.mean_new_tokens={self.mean - PROMPT_TOKENS}", f"trainer.pack_tokens={self.length}",
        ]  # fmt: skip
        return load_config("train", [*common, *self.overrides, *more], schema=RunConfig)


QWEN3_235B = (
    "model=qwen3-235b-a22b", "trainer.prompts_per_step=16", "parallel.tensor=2", "parallel.context=2",
    "parallel.expert=16", "parallel.pipeline=8", "parallel.first_stage_layers=11", "parallel.last_stage_layers=11",
    "parallel.sequence=true", "trainer.recompute=full", "rollout.vllm.tensor_parallel=16",
)  # fmt: skip
RUNS = (
    Published(
        "Llama-3.1-8B, 16 GPUs", 97.7, 4096, 1060,
        (
            "model=llama3.1-8b-instruct", "cluster.nodes=2", "trainer.prompts_per_step=64", "parallel.tensor=1",
            "parallel.pipeline=2", "trainer.recompute=full", "rollout.vllm.tensor_parallel=1",
        ),
    ),
    Published(
        "Qwen3-30B-A3B, 32 GPUs", 192.0, 4096, 3203,
        (
            "model=qwen3-30b-a3b", "cluster.nodes=4", "trainer.prompts_per_step=64", "parallel.tensor=1",
            "parallel.pipeline=1", "parallel.expert=8", "rollout.vllm.tensor_parallel=2",
        ),
    ),
    Published(
        "Qwen3-32B, 32 GPUs", 393.0, 4096, 3206,
        (
            "model=qwen3-32b", "cluster.nodes=4", "trainer.prompts_per_step=64", "parallel.tensor=4",
            "parallel.pipeline=4", "parallel.sequence=true", "rollout.vllm.tensor_parallel=4",
        ),
    ),
    Published("Qwen3-235B-A22B, 128 GPUs", 395.0, 8192, 5698, ("cluster.nodes=16", *QWEN3_235B)),
    Published("Qwen3-235B-A22B, 256 GPUs", 312.0, 8192, 5713, ("cluster.nodes=32", *QWEN3_235B)),
)  # fmt: skip


def ratio(run: Published, *more: str) -> float:
    """Estimated over published seconds. Raises ValueError if the plan refuses the run."""
    from echorl_nemo.plan.plan import make_plan

    made = make_plan(run.config(*more), elsewhere=True)
    if made.problems:
        raise ValueError(f"{run.name} is refused: {made.problems}")
    return sum(item.value for item in made.seconds) / run.seconds


def fit(runs: Sequence[Published]) -> tuple[dict[str, float], float]:
    """The constants of `GRID` with the smallest largest error on ``runs``, and that error, a factor."""
    from echorl_nemo.checks.hf_config import known_config
    from echorl_nemo.checks.layout_and_batch import resolve_on_cluster
    from echorl_nemo.plan.estimate import step_seconds
    from echorl_nemo.plan.parameters import stage_parameters

    counted = []
    for run in runs:
        config = run.config()
        resolve_on_cluster(config)
        hf = known_config(config.model)
        counted.append((run, config, hf, stage_parameters(hf, config.parallel, detect_platform("cpu"))))
    best: tuple[float, dict[str, float]] = (math.inf, {})
    for values in itertools.product(*GRID.values()):
        constants = dict(zip(GRID, values, strict=True))
        errors = []
        for run, config, hf, stages in counted:
            for name, value in constants.items():
                setattr(config.cluster, name, value)
            seconds = sum(item.value for item in step_seconds(config, hf, stages))
            errors.append(abs(math.log(seconds / run.seconds)))
        if max(errors) < best[0]:
            best = (max(errors), constants)
    return best[1], math.exp(best[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="look for the constants that fit best")
    options = parser.parse_args()
    silence_library_warnings()
    detect_platform("cpu")
    console = Console(width=110)
    if options.fit:
        constants, error = fit([run for run in RUNS if run.name in FITTED])
        console.print(f"{constants}: within a factor of {error:.2f} on {', '.join(FITTED)}")
        return
    table = Table("run", "published, s", "estimated, s", "ratio", "")
    for run in RUNS:
        found = ratio(run)
        used = "fitted" if run.name in FITTED else "predicted"
        table.add_row(run.name, f"{run.seconds:.1f}", f"{found * run.seconds:.0f}", f"{found:.2f}", used)
    console.print(table)


if __name__ == "__main__":
    main()
