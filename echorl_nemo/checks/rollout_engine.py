"""Checks of the rollout engine, and of settings that use its numbers."""

from collections.abc import Mapping
from typing import Any

from echorl_nemo.checks.packages import is_installed
from echorl_nemo.rollout.trtllm.api import REFUSED, load_api
from echorl_nemo.schema import ParallelConfig, RunConfig


def native_problems(config: RunConfig) -> list[str]:
    """Problems with a run on the native engine that follow from its settings."""
    return [*uneven_stage_problems(config.parallel), *engine_problems(config), *rollout_problems(config)]


def uneven_stage_problems(layout: ParallelConfig) -> list[str]:
    """A problem for each size of a pipeline stage that is given: the native engine's stages are equal."""
    return [
        f"parallel.{key}={value}: only NeMo-RL has it; use null, or engine=nemo_rl"
        for key in ("first_stage_layers", "last_stage_layers")
        if (value := getattr(layout, key)) is not None
    ]


def engine_problems(config: RunConfig) -> list[str]:
    """Problems with settings that only other engines support."""
    if config.rollout.engine == "vllm":
        return ["rollout.engine=vllm: only NeMo-RL has it; use megatron or trtllm, or engine=nemo_rl"]
    return []


def rollout_problems(config: RunConfig) -> list[str]:
    """Problems with settings that the rollout engine does not support, or that contradict each other."""
    rollout, algo, echorl = config.rollout, config.algo, config.echorl
    problems = []
    if rollout.engine == "trtllm":
        problems += refused_problems(rollout.trtllm.extra, "rollout.trtllm.extra")
        if not rollout.trtllm.colocated:
            problems.append(
                "rollout.trtllm.colocated=false: weights are transferred through the memory of a GPU that trainer and "
                "engine share; use true"
            )
        if rollout.trtllm.timeout_minutes >= config.trainer.timeout_minutes:
            problems.append(
                f"rollout.trtllm.timeout_minutes={rollout.trtllm.timeout_minutes:g}: the other ranks wait for the "
                f"engine no longer than trainer.timeout_minutes={config.trainer.timeout_minutes}; use less, or raise "
                "that"
            )
        needs = algo.importance == "rollout" or algo.tis_cap or algo.icepop_low or algo.icepop_high
        plain = rollout.top_p == 1.0 and rollout.top_k == 0
        if needs and rollout.temperature != 1.0 and not (plain and _may_give_processed_logprobs()):
            problems.append(
                f"rollout.temperature={rollout.temperature}: TensorRT-LLM's log-probs are those of temperature 1 (all "
                "of those without logprobs_mode, and with top_p or top_k), and algo.importance=rollout, tis_cap and "
                "icepop need those that were sampled from; use 1"
            )
    if algo.importance == "rollout" and echorl.enabled and echorl.entropy_source != "rollout":
        problems.append(
            "algo.importance=rollout skips the scoring pass, which gives the entropies of "
            "echorl.entropy_source=policy; use entropy_source=rollout, importance=policy, or echorl=off"
        )
    if algo.demonstrations == "luffy" and echorl.entropy_source == "rollout":
        problems.append(
            "echorl.entropy_source=rollout with algo.demonstrations=luffy: the rollout engine has no entropies of a "
            "solution; use entropy_source=policy"
        )
    return problems


def _may_give_processed_logprobs() -> bool:
    """Whether the installed TensorRT-LLM returns log-probs after temperature. True if it is not installed: the ranks'
    environment, where the run is checked again, may be another one."""
    return not is_installed("tensorrt_llm") or load_api().processed_logprobs


def refused_problems(extra: Mapping[str, Any], field: str) -> list[str]:
    """Problems with the user's arguments of AsyncLLM, the value of the key ``field``."""
    return [
        f"{field}.{name}={extra[name]!r}: {reason}; leave it out"
        for name, reason in REFUSED.items()
        if not _is_neutral(extra.get(name))
    ]


def _is_neutral(value: Any) -> bool:
    """Whether an argument is absent, off, or a size of one."""
    return value is None or value is False or (value == 1 and value is not True)
