"""Checks of a run in NeMo-RL: settings that it does not support, and settings under which EchoRL has no effect."""

from dataclasses import asdict
from typing import Any

from echorl_nemo.engines.nemo_rl.config import echorl_config, get
from echorl_nemo.engines.nemo_rl.overrides import ESTIMATORS, LOSSES, UNREAD
from echorl_nemo.engines.nemo_rl.upstream import missing_names
from echorl_nemo.errors import UserError
from echorl_nemo.schema import RunConfig, changed


def run_problems(config: RunConfig) -> list[str]:
    """Problems with a run's configuration in NeMo-RL."""
    settings = {
        "loss_fn": {"echorl": asdict(config.echorl)},
        "policy": {"megatron_cfg": {"enabled": True}},
        "grpo": {"use_dynamic_sampling": config.algo.dynamic_sampling},
    }
    found = host_problems(settings) + translation_problems(config)
    # the keys are those of the run's own configuration here
    return [
        problem.replace("loss_fn.echorl", "echorl").replace("grpo.use_dynamic", "algo.dynamic") for problem in found
    ]


def translation_problems(config: RunConfig) -> list[str]:
    """Problems with settings that NeMo-RL 0.7 does not support."""
    algo, data = config.algo, config.data
    found = []
    for key, value, wanted in (
        ("algo.entropy_coef", algo.entropy_coef, 0.0),
        ("algo.denominator", algo.denominator, "all"),
        ("algo.importance", algo.importance, "policy"),
        ("algo.degenerate", algo.degenerate, "zero"),
        ("algo.policy_tokens", algo.policy_tokens, "all"),
        ("algo.anchor", algo.anchor, "none"),
        ("algo.demonstrations", algo.demonstrations, "none"),
        ("data.reward", data.reward, "math"),
        ("data.extra_rewards", len(data.extra_rewards), 0),
        ("trainer.eval_group_size", config.trainer.eval_group_size, 1),
        ("trainer.eval_temperature", config.trainer.eval_temperature, None),
        ("parallel.device", config.parallel.device == "cpu", False),
    ):
        if value != wanted:
            found.append(f"{key}={value}: NeMo-RL does not support it; use {wanted}, or engine=megatron")
    found += [
        f"{key}={value}: NeMo-RL does not support it; use one of {', '.join(known)}, or engine=megatron"
        for key, value, known in (("algo.estimator", algo.estimator, ESTIMATORS), ("algo.loss", algo.loss, LOSSES))
        if value not in known
    ]
    found += [
        f"{key}={value}: NeMo-RL does not read it; leave it out, or use engine=megatron"
        for key, value in changed(config, UNREAD)
    ]
    if config.rollout.engine == "trtllm":
        found.append(
            "rollout.engine=trtllm: NeMo-RL v0.7.0 does not have it; use rollout=vllm, or its main branch with "
            "conf/nemo_rl/grpo_70b_trtllm.yaml (docs/nemo_rl.md)"
        )
    if config.parallel.context > 1 and not config.trainer.pack_tokens:
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        found.append(
            f"parallel.context={config.parallel.context}: NeMo-RL splits only packed rows; set trainer.pack_tokens to "
            f"{longest} or more"
        )
    if (algo.icepop_low is None) != (algo.icepop_high is None):
        found.append(
            f"algo.icepop_low={algo.icepop_low}, algo.icepop_high={algo.icepop_high}: NeMo-RL needs both bounds; give "
            "both, or engine=megatron"
        )
    if algo.tis_cap is not None and algo.icepop_high is not None:
        found.append(
            f"algo.tis_cap={algo.tis_cap} beside algo.icepop_high={algo.icepop_high}: NeMo-RL does one of them; set "
            "one to null, or engine=megatron"
        )
    if algo.aggregation == "constant":
        found.append(
            "algo.aggregation=constant: NeMo-RL divides by tokens or rollouts; use token_mean or rollout_mean, or "
            "algo=nemo_rl"
        )
    return found


def host_problems(config: Any) -> list[str]:
    """Problems with settings in ``config``, NeMo-RL's master configuration, under which EchoRL would have no effect or
    a wrong one."""
    found = []
    try:
        echorl = echorl_config(get(config, "loss_fn"))
    except UserError as error:
        return [str(error)]
    if echorl.entropy_source != "policy":
        found.append(
            f"loss_fn.echorl.entropy_source={echorl.entropy_source}: entropies come from the scoring pass; use policy"
        )
    for key, value, use in (
        ("fork_threshold", "running", "step"),
        ("coef_schedule", "linear", "constant or entropy"),
    ):
        if getattr(echorl, key) == value:
            found.append(
                f"loss_fn.echorl.{key}={value}: NeMo-RL's checkpoints keep nothing of EchoRL between steps; use {use}"
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
    if quantised := get(policy, "quant_cfg"):
        found.append(
            f"policy.quant_cfg={quantised}: a quantised policy has a worker of its own, in whose place EchoRL's would "
            "train one that is not quantised; use null"
        )
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


def upstream_problems() -> list[str]:
    """A problem for each name that EchoRL uses and the installed NeMo-RL does not have."""
    return [
        f"this NeMo-RL has no {name}; use v0.6.0, v0.7.0 or main of 2026-08-22, which EchoRL was tested with"
        for name in missing_names()
    ]
