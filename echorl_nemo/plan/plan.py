"""The plan of a run: problems, layout and parameters, estimates of memory, time and network volume."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from echorl_nemo.checks.commands import check_run
from echorl_nemo.checks.files_and_folders import space_problems
from echorl_nemo.checks.layout_and_batch import layout_problems, layout_warnings, memory_problems, resolve_on_cluster
from echorl_nemo.data.inputs import RunInputs
from echorl_nemo.engines.megatron.platform import detect_platform
from echorl_nemo.plan.estimate import Estimate, Memory, memory, network_gigabytes, step_seconds
from echorl_nemo.plan.parameters import StageParameters, stage_parameters, total_parameters
from echorl_nemo.schema import RunConfig

COUNTED = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Architectures for which the formulas are right."""


@dataclass
class Plan:
    """Everything that is known about a run before it starts. Estimates are empty if the layout does not divide the
    model."""

    config: RunConfig
    model_type: str = "unknown model"
    """Architecture, under transformers' name."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    parameters: int | None = None
    """Parameters of the whole model; None if they are not counted."""
    stages: list[StageParameters] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    seconds: list[Estimate] = field(default_factory=list)
    """Seconds of each phase of a step."""
    network: list[Estimate] = field(default_factory=list)
    """GB that a GPU sends in a step."""
    inputs: RunInputs | None = None
    """Tokenizer and prompts of the run; None if they were not looked for, or cannot be read."""

    @property
    def ok(self) -> bool:
        """Whether the run may start."""
        return not self.problems


def make_plan(config: RunConfig, *, elsewhere: bool = False, packages: bool = True) -> Plan:
    """Check a run, and estimate its memory, time and network volume. Fills in the sizes that ``config.parallel`` leaves
    unset.

    ``elsewhere``: the run is for another machine: do not check that files, folders and packages exist here.
    ``packages``: whether the ranks run in this environment: check that it has the packages.
    """
    plan = Plan(config)
    plan.problems += resolve_on_cluster(config)
    plan.warnings += layout_warnings(config)
    found = check_run(config, files=not elsewhere, packages=packages and not elsewhere)
    plan.problems += found.problems
    plan.inputs = found.inputs
    if found.hf_config is not None:
        plan.model_type = found.hf_config.model_type
        _count(plan, found.hf_config)
    if plan.parameters is not None and not elsewhere:
        plan.problems += space_problems(Path(config.trainer.run_dir), plan.parameters)
    return plan


def _count(plan: Plan, hf_config: PretrainedConfig) -> None:
    """Fill in parameters and estimates, if the layout divides the model."""
    config = plan.config
    if hf_config.model_type not in COUNTED:
        plan.warnings.append(
            f"a {hf_config.model_type} is not counted: parameters, memory, time and network volume are known of "
            f"{', '.join(COUNTED)}"
        )
        return
    if layout_problems(config.parallel, hf_config):  # among the problems already
        return
    plan.stages = stage_parameters(hf_config, config.parallel, detect_platform("cpu"))
    plan.parameters = total_parameters(plan.stages, hf_config)
    plan.memory = memory(config, hf_config, plan.stages)
    plan.seconds = step_seconds(config, hf_config, plan.stages)
    plan.network = network_gigabytes(config, hf_config, plan.stages)
    worst = max(plan.memory, key=lambda each: each.peak)
    largest = max(worst.items, key=lambda item: item.value)
    plan.problems += memory_problems(
        config, stage=worst.stage, peak=worst.peak, largest=largest.name, largest_gib=largest.value
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as a dictionary for scripts, in GiB, seconds and GB."""
    layout, cluster = plan.config.parallel, plan.config.cluster
    return {
        "ok": plan.ok,
        "problems": plan.problems,
        "warnings": plan.warnings,
        "engine": plan.config.engine,
        "layout": {
            name: getattr(layout, name) for name in ("tensor", "pipeline", "context", "expert", "sequence", "data")
        },
        "cluster": {"nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node},
        "parameters": plan.parameters,
        "stages": [vars(stage) for stage in plan.stages],
        "memory_gib": [
            {"stage": each.stage, "update": each.update, "generate": each.generate, "items": _plain(each.items)}
            for each in plan.memory
        ],
        "step_seconds": _plain(plan.seconds),
        "network_gb": _plain(plan.network),
    }


def _plain(items: list[Estimate]) -> list[dict[str, Any]]:
    return [vars(item) for item in items]


def print_problems(plan: Plan) -> None:
    """Print every problem and warning to standard error, one a line."""
    for problem in plan.problems:
        print(f"error: {problem}", file=sys.stderr)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
