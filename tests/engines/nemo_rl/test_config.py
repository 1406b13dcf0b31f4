"""Every configuration under which EchoRL would silently do nothing is refused; every recipe parses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from echorl_nemo.checks.nemo_rl import host_problems
from echorl_nemo.engines.nemo_rl.config import echorl_config
from echorl_nemo.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parents[3] / "conf" / "nemo_rl"
RECIPES = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
GOOD: dict[str, Any] = {
    "loss_fn": {"echorl": {"coef": 1e-3}, "force_on_policy_ratio": False},
    "policy": {"megatron_cfg": {"enabled": True}},
    "grpo": {"use_dynamic_sampling": False, "seq_logprob_error_threshold": None, "adv_estimator": {"name": "grpo"}},
}


def with_setting(key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(GOOD)
    *path, last = key.split(".")
    section = config
    for name in path:
        section = section.setdefault(name, {})
    section[last] = value
    return config


def test_a_good_configuration_passes() -> None:
    assert host_problems(GOOD) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss_fn.echorl", None, "loss_fn.echorl is missing: start from a recipe of conf/nemo_rl"),
        ("loss_fn.echorl.coeff", 1.0, "loss_fn.echorl.coeff: no such key; did you mean coef?"),
        ("loss_fn.echorl.span", "suffix", "loss_fn.echorl.span='suffix' is not known; use one of prefix"),
        ("loss_fn.echorl.coef", "much", "loss_fn.echorl.coef='much' is not a number"),
        ("loss_fn.echorl.entropy_source", "rollout", "entropy_source=rollout: entropies come from the scoring pass"),
        ("loss_fn.echorl.fork_threshold", "running", "loss_fn.echorl.fork_threshold=running: NeMo-RL's checkpoints"),
        ("loss_fn.echorl.coef_schedule", "linear", "coef_schedule=linear with no steps to rise or fall in"),
        (
            "loss_fn.echorl",
            {"coef_schedule": "linear", "coef_decay_steps": 9},
            "keep nothing of EchoRL between steps; use constant or entropy",
        ),
        ("policy.megatron_cfg.enabled", False, "policy.megatron_cfg.enabled=false: exact entropies come from"),
        ("policy.megatron_cfg.use_fused_linear_logprobs", True, "use_fused_linear_logprobs=true: there are no logits"),
        ("policy.megatron_cfg.use_linear_ce_fusion_loss", True, "use_linear_ce_fusion_loss=true: there are no logits"),
        ("policy.quant_cfg", "FP8_DEFAULT_CFG", "policy.quant_cfg=FP8_DEFAULT_CFG: a quantised policy has a worker of"),
        ("data_plane.enabled", True, "data_plane.enabled=true: that trainer does not pass the batch"),
        ("grpo.use_dynamic_sampling", True, "grpo.use_dynamic_sampling=true: it drops the all-correct groups"),
        ("loss_fn.force_on_policy_ratio", True, "loss_fn.force_on_policy_ratio=true: it skips the log-prob pass"),
        ("grpo.reward_scaling.enabled", True, "grpo.reward_scaling.enabled=true: success is decided on the reward"),
        ("grpo.adv_estimator.name", "opd", "grpo.adv_estimator.name=opd: it distils from a teacher"),
    ],
)
def test_every_guard_fires(key: str, value: Any, message: str) -> None:
    (problem,) = host_problems(with_setting(key, value))
    assert problem.startswith(message) or message in problem


def test_a_log_prob_pass_for_the_error_threshold_is_enough() -> None:
    config = with_setting("loss_fn.force_on_policy_ratio", True)
    config["grpo"]["seq_logprob_error_threshold"] = 2.0
    assert host_problems(config) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_parses(recipe: str) -> None:
    values = yaml.safe_load((CONFIG_DIR / f"{recipe}.yaml").read_text())
    assert values["defaults"].startswith("/opt/nemo-rl/examples/configs/")
    assert echorl_config(values["loss_fn"]).coef == 1e-3
    merged = copy.deepcopy(GOOD)
    for section in ("loss_fn", "grpo"):
        merged[section] |= values.get(section, {})
    merged["policy"] |= values.get("policy", {})
    merged["policy"]["megatron_cfg"]["enabled"] = True
    assert host_problems(merged) == []


def test_there_are_recipes() -> None:
    assert {"grpo_1.5b", "grpo_7b", "grpo_70b_vllm", "grpo_70b_trtllm"} <= set(RECIPES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("coef", "1e-3", "coef='1e-3' is a text and not a number; write it without quotes"),
        ("coef", None, "coef=None is not a number; give a value"),
        ("coef", [0.1], r"coef=\[0.1\] is not a number"),
        ("enabled", "no", "enabled='no' is not true or false"),
        ("seed", 2.5, "seed=2.5 is not a whole number"),
        ("seed", True, "seed=True is not a whole number"),
        ("span", ["prefix"], r"span=\['prefix'\] is not a text"),
        ("coef_decay_steps", None, "coef_decay_steps=None is not a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: Any, message: str) -> None:
    """NeMo-RL's configurations do not pass through our schema, which would convert or refuse."""
    with pytest.raises(UserError, match=f"^loss_fn.echorl.{message}"):
        echorl_config({"echorl": {key: value}})


def test_missing_is_no_typo() -> None:
    with pytest.raises(UserError, match="loss_fn.echorl is missing"):
        echorl_config({})
