"""What EchoRL adds to a NeMo-Aligner configuration: `model.echorl`, `model.grpo.algo`, `verifier`.

Everything else keeps upstream's keys, with `grpo` where REINFORCE has `reinforce`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.errors import UserError, nearest
from echorl_nemo.grpo import AlgoConfig
from echorl_nemo.ops.ranges import check_fields, number

SectionT = TypeVar("SectionT")


@dataclass(kw_only=True)
class VerifierConfig:
    """Rewards in process, `verifier`; with `name: null` the remote reward model of `remote_rm` decides."""

    name: str | None = "math"
    """Verifier that decides success: `math`, `exact_line`, `choice`, or one's own as `package.module:function` of
    (response, answer). Null asks `remote_rm`."""

    extra: dict[str, float] = field(default_factory=dict)
    """Further verifiers with their weights; added to the reward after success is decided."""

    workers: int = number(2, "[1, 1024]")
    """Processes that verify, of each replica of the policy."""

    timeout: float = number(10.0, "(0, 86400]")
    """Seconds that a verifier may take for a response; then its reward is 0, and counted."""

    def __post_init__(self) -> None:
        problems = [
            f"verifier.extra.{name}={weight}: a weight is a finite number"
            for name, weight in self.extra.items()
            if not math.isfinite(weight)
        ]
        if self.extra and self.name is None:
            problems.append("verifier.extra: with verifier.name=null the remote reward model is the only reward")
        check_fields(self, "verifier", problems)


def section(values: DictConfig | Mapping[str, Any] | None, schema: type[SectionT], where: str) -> SectionT:
    """The part of a configuration at ``where`` as its dataclass.

    Raises UserError that names key, value and remedy; a key that does not exist is one.
    """
    given = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else dict(values or {})
    assert isinstance(given, dict)
    keys = [spec.name for spec in fields(schema)]  # type: ignore[arg-type]
    for key in map(_text, given):
        if key not in keys:
            raise UserError(f"{where}.{key}: no such key; {nearest(key, keys)}")
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}.{_text(error.full_key)}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    assert isinstance(merged, schema)
    return merged


def _text(key: Any) -> str:
    return str(key)


def algorithm(model_config: DictConfig) -> tuple[AlgoConfig, EchoRLConfig]:
    """`model.grpo.algo` and `model.echorl`.

    Raises UserError for what this engine cannot do: NeMo-Aligner's rollouts come without log-probs, and a step asks its
    prompts once.
    """
    algo = section(model_config.grpo.get("algo"), AlgoConfig, "model.grpo.algo")
    echorl = section(model_config.get("echorl"), EchoRLConfig, "model.echorl")
    problems = [
        f"model.grpo.algo.{name}={getattr(algo, name)}: NeMo-Aligner's rollouts come without log-probs; use null"
        for name in ("tis_cap", "icepop_low", "icepop_high")
        if getattr(algo, name) is not None
    ]
    if algo.dynamic_sampling:
        problems.append("model.grpo.algo.dynamic_sampling=true: a step asks its prompts once here; use false")
    if echorl.entropy_source != "policy":
        problems.append(
            f"model.echorl.entropy_source={echorl.entropy_source}: NeMo-Aligner's TensorRT-LLM returns tokens alone; "
            "use policy"
        )
    if problems:
        raise UserError("\n".join(problems))
    return algo, echorl


def batch_problems(grpo: DictConfig, model_config: DictConfig, data_parallel: int) -> list[str]:
    """What does not divide in a step; ``grpo`` is `trainer.grpo`."""
    prompts, group = model_config.grpo.num_rollout_samples, grpo.num_rollouts_per_prompt
    rollouts, step = prompts * group, model_config.global_batch_size
    generated, scored = model_config.grpo.rollout_micro_batch_size, model_config.grpo.forward_micro_batch_size
    validated, validation = model_config.grpo.val_rollout_micro_batch_size, model_config.grpo.num_val_samples
    problems = []
    if group < 2:
        problems.append(
            f"trainer.grpo.num_rollouts_per_prompt={group}: a group needs rollouts to compare; use 2 or more"
        )
    trained = model_config.micro_batch_size
    if grpo.trt_llm.enable and grpo.trt_llm.reshard:  # pipeline stages generate as further replicas
        generated *= model_config.pipeline_model_parallel_size
        validated *= model_config.pipeline_model_parallel_size
    for what, count, key, divisor in (
        ("prompts of a step", prompts, "model.grpo.rollout_micro_batch_size x replicas", generated * data_parallel),
        (
            "prompts of a validation", validation, "model.grpo.val_rollout_micro_batch_size x replicas",
            validated * data_parallel,
        ),
        ("rollouts of a step", rollouts, "model.global_batch_size", step),
        ("rollouts of an optimizer step", step, "model.micro_batch_size x replicas", trained * data_parallel),
        ("rollouts of a replica", rollouts // data_parallel, "model.grpo.forward_micro_batch_size", scored),
    ):  # fmt: skip
        if count % divisor:
            problems.append(f"{key}={divisor} does not divide the {count} {what}")
    return problems
