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


def problems(config: Any) -> list[str]:
    """Problems of settings in ``config``, NeMo-RL's master configuration, under which EchoRL would have no effect or a
    wrong one."""
    found = []
    try:
        echorl = echorl_config(get(config, "loss_fn"))
    except UserError as error:
        return [str(error)]
    if echorl.entropy_source != "policy":
        found.append(
            f"loss_fn.echorl.entropy_source={echorl.entropy_source}: entropies come from the scoring pass; use policy"
        )
    policy, grpo = get(config, "policy"), get(config, "grpo")
    megatron = get(policy, "megatron_cfg") or {}
    if not get(megatron, "enabled"):
        found.append(
            "policy.megatron_cfg.enabled=false: exact entropies come from the Megatron worker's logits; use a Megatron "
            "configuration (policy.dtensor_cfg.enabled=false policy.megatron_cfg.enabled=true)"
        )
    for key in ("use_fused_linear_logprobs", "use_linear_ce_fusion_loss"):
        if get(megatron, key):
            found.append(f"policy.megatron_cfg.{key}=true: there are no logits to take entropies from; use false")
    if get(get(config, "data_plane") or {}, "enabled"):
        found.append("data_plane.enabled=true: that trainer does not pass the batch through the driver; use false")
    if get(grpo, "use_dynamic_sampling"):
        found.append("grpo.use_dynamic_sampling=true: it drops the all-correct groups that EchoRL feeds on; use false")
    loss_fn = get(config, "loss_fn")
    if get(loss_fn, "force_on_policy_ratio") and get(grpo, "seq_logprob_error_threshold") is None:
        found.append(
            "loss_fn.force_on_policy_ratio=true: it skips the log-prob pass, and the entropies with it; use false, or "
            "set grpo.seq_logprob_error_threshold"
        )
    if get(get(grpo, "reward_scaling") or {}, "enabled"):
        found.append(
            "grpo.reward_scaling.enabled=true: success is decided on the reward, and this changes it before EchoRL "
            "sees it; use false"
        )
    if get(get(grpo, "adv_estimator") or {}, "name") == "opd":
        found.append("grpo.adv_estimator.name=opd: it distils from a teacher and has no rewards of success; use grpo")
    return found


def get(section: Any, key: str) -> Any:
    """The value of ``key`` in ``section``, a mapping or an object with attributes; None if it has no such key."""
    if isinstance(section, Mapping):
        return section.get(key)
    return getattr(section, key, None)
