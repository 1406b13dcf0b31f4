"""A run in NeMo-RL's words: every setting arrives, under keys that the real recipe has."""

import os
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from echorl_nemo.checks.nemo_rl import translation_problems
from echorl_nemo.config import load_config
from echorl_nemo.engines.nemo_rl.overrides import overrides
from echorl_nemo.schema import RunConfig

ABSENT = {
    "policy.tokenizer.chat_template", "data.train.data_path", "data.train.input_key", "data.train.output_key",
    "data.default.system_prompt_file",
}  # fmt: skip
"""Keys that the container's recipe does not write down and its code reads."""


def settings(*changes: str, evaluate: bool = True) -> dict[str, Any]:
    config = load_config(
        "echo_grpo_70b",
        ["engine=nemo_rl", "algo=nemo_rl", "rollout=vllm", "parallel.tensor=4", "parallel.pipeline=8",
         "parallel.context=2", "trainer.pack_tokens=16384", "parallel.data=1", "trainer.run_dir=/shared/run", *changes],
        schema=RunConfig,
    )  # fmt: skip
    assert translation_problems(config) == []
    lines = overrides(
        config, train=Path("/launch/train.jsonl"), evaluate=Path("/launch/eval.jsonl") if evaluate else None,
        eval_prompts=500 if evaluate else 0, stop_ids=[128001, 128009],
    )  # fmt: skip
    parsed = OverridesParser.create().parse_overrides(lines)
    return {each.key_or_group: each.value() for each in parsed}


def test_every_setting_arrives() -> None:
    ours = settings("echorl.coef=0.25", "trainer.warmup_steps=5", "data.eval=x", "trainer.eval_every=10")
    expected = {
        "policy.model_name": "meta-llama/Llama-3.1-70B-Instruct",
        "policy.tokenizer.chat_template": None,
        "policy.train_global_batch_size": 512,
        "policy.max_total_sequence_length": 9216,
        "policy.make_sequence_length_divisible_by": 16,
        "policy.megatron_cfg.tensor_model_parallel_size": 4,
        "policy.megatron_cfg.pipeline_model_parallel_size": 8,
        "policy.megatron_cfg.context_parallel_size": 2,
        "policy.megatron_cfg.sequence_parallel": True,
        "policy.megatron_cfg.activation_checkpointing": True,
        "policy.megatron_cfg.scheduler.lr_warmup_iters": 3,
        "policy.generation.backend": "vllm",
        "policy.generation.stop_token_ids": [128001, 128009],
        "policy.generation.vllm_cfg.tensor_parallel_size": 4,
        "loss_fn.echorl.coef": 0.25,
        "loss_fn.token_level_loss": True,
        "grpo.normalize_rewards": False,
        "grpo.val_period": 10,
        "data.train.data_path": "/launch/train.jsonl",
        "checkpointing.checkpoint_dir": "/shared/run/checkpoints",
        "cluster.num_nodes": 8,
    }
    assert {key: ours[key] for key in expected} == expected
    assert ours["data.validation"]["data_path"] == "/launch/eval.jsonl"


def test_without_prompts_to_validate_with_nothing_is_validated() -> None:
    ours = settings(evaluate=False)
    assert ours["data.validation"] is None and ours["checkpointing.metric_name"] is None
    assert ours["grpo.val_period"] == 0 and not ours["grpo.val_at_start"]


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        (["algo.loss=gspo"], "loss_fn.sequence_level_importance_ratios", True),
        (["algo.loss=cispo"], "loss_fn.use_cispo", True),
        (["algo.tis_cap=2"], "loss_fn.truncated_importance_sampling_ratio", 2.0),
        (["algo.icepop_low=0.5", "algo.icepop_high=5"], "loss_fn.truncated_importance_sampling_type", "icepop"),
        (["algo.estimator=rloo"], "grpo.use_leave_one_out_baseline", True),
        (["algo.estimator=reinforce_plus_plus"], "grpo.adv_estimator.name", "reinforce_plus_plus"),
        (["parallel.context=1", "trainer.pack_tokens=0"], "policy.sequence_packing.enabled", False),
        (["trainer.pack_tokens=16384"], "policy.sequence_packing.train_mb_tokens", 16384),
        (["logger.wandb_project=echo"], "logger.wandb.project", "echo"),
    ],
)
def test_what_is_asked_for_is_written(changes: list[str], key: str, value: Any) -> None:
    assert settings(*changes)[key] == value


@pytest.mark.skipif("NEMO_RL_HOME" not in os.environ, reason="NEMO_RL_HOME names no checkout of NeMo-RL")
def test_the_real_recipe_has_the_keys() -> None:
    from nemo_rl.utils import config as upstream
    from omegaconf import OmegaConf

    upstream.register_omegaconf_resolvers()
    recipe = Path(os.environ["NEMO_RL_HOME"]) / "examples" / "configs" / "grpo_math_1B_megatron.yaml"
    composed = upstream.load_config(str(recipe))
    missing = object()
    for key in settings():
        if not key.startswith("loss_fn.echorl.") and key not in ABSENT:
            assert OmegaConf.select(composed, key, default=missing) is not missing, key
