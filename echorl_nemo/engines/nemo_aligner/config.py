"""The sections that EchoRL adds to a NeMo-Aligner configuration: `model.echorl`, `model.grpo.algo`, `verifier`.

All other keys are upstream's, with `grpo` where REINFORCE has `reinforce`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.errors import UserError, did_you_mean
from echorl_nemo.grpo import AlgoConfig
from echorl_nemo.ops.ranges import check_fields, number

SectionT = TypeVar("SectionT")


@dataclass(kw_only=True)
class VerifierConfig:
    """The section `verifier`: rewards from verifiers in process. With `name: null` the remote reward model of
    `remote_rm` decides."""

    name: str | None = "math"
    """Verifier that decides success: `math`, `exact_line`, `choice`, or your own function, `package.module:name`, of
    (response, answer). Null uses `remote_rm`."""

    extra: dict[str, float] = field(default_factory=dict)
    """Further verifiers with their weights. Their weighted values are added to the reward after success is decided."""

    workers: int = number(2, "[1, 1024]")
    """Processes that verify for each replica of the policy."""

    timeout: float = number(10.0, "(0, 86400]")
    """Seconds that a verifier may take for a response. After that its reward is 0 and the failure is counted."""

    def __post_init__(self) -> None:
        problems = [
            f"verifier.extra.{name}={weight}: a weight is a finite number"
            for name, weight in self.extra.items()
            if not math.isfinite(weight)
        ]
        if self.extra and self.name is None:
            problems.append("verifier.extra: with verifier.name=null the remote reward model is the only reward")
        check_fields(self, "verifier", problems)


def parse_section(values: DictConfig | Mapping[str, Any] | None, schema: type[SectionT], where: str) -> SectionT:
    """Parse the section ``where`` of a configuration into its dataclass.

    Raises UserError for a key that does not exist, or a value of a wrong type or range.
    """
    given = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else dict(values or {})
    assert isinstance(given, dict)
    keys = [spec.name for spec in fields(schema)]  # type: ignore[arg-type]
    for key in map(_text, given):
        if key not in keys:
            raise UserError(f"{where}.{key}: no such key; {did_you_mean(key, keys)}")
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


def method_config(model_config: DictConfig) -> tuple[AlgoConfig, EchoRLConfig]:
    """Parse `model.grpo.algo` and `model.echorl`. Raises UserError for a key or value that is not allowed."""
    algo = parse_section(model_config.grpo.get("algo"), AlgoConfig, "model.grpo.algo")
    return algo, parse_section(model_config.get("echorl"), EchoRLConfig, "model.echorl")
