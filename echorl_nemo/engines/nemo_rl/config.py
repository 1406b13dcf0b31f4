"""The section `loss_fn.echorl` of a NeMo-RL configuration, and the settings under which it works."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.errors import UserError, did_you_mean


def echorl_config(loss_fn: Any) -> EchoRLConfig:
    """Parse the settings of the method from ``loss_fn``, the section of the configuration.

    Raises UserError that names key, value and remedy.
    """
    values = get(loss_fn, "echorl")
    if values is None:
        raise UserError(
            "loss_fn.echorl is missing: start from a recipe of conf/nemo_rl, or give loss_fn.echorl.coef=1e-3"
        )
    known = [spec.name for spec in fields(EchoRLConfig)]
    for key in values:
        if key not in known:
            raise UserError(f"loss_fn.echorl.{key}: no such key; {did_you_mean(str(key), known)}")
    try:
        return EchoRLConfig(**dict(values))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"loss_fn.{error}" if str(error).startswith("echorl.") else f"loss_fn.echorl: {error}"
        ) from error


def get(section: Any, key: str) -> Any:
    """The value of ``key`` in ``section``, a mapping or an object with attributes; None if it has no such key."""
    if isinstance(section, Mapping):
        return section.get(key)
    return getattr(section, key, None)
