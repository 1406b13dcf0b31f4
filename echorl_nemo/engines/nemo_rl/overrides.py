"""Translates a RunConfig into overrides of NeMo-RL's configuration, conf/nemo_rl/run.yaml (keys of v0.7.0)."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from echorl_nemo.engines.hydra_overrides import override
from echorl_nemo.schema import RunConfig

ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {"normalize_rewards": True, "use_leave_one_out_baseline": False},
    "dr_grpo": {"normalize_rewards": False, "use_leave_one_out_baseline": False},
    "rloo": {"normalize_rewards": False, "use_leave_one_out_baseline": True},
    "reinforce_plus_plus": {"adv_estimator.name": "reinforce_plus_plus", "adv_estimator.minus_baseline": False},
}
LOSSES: dict[str, dict[str, Any]] = {
    "clipped": {},
    "gspo": {"sequence_level_importance_ratios": True},
    "cispo": {"use_cispo": True},
}

UNREAD = (
    "model.keep_special_tokens",
    "data.solutions",
    "rollout.check_share",
    "data.reward_timeout",
    "data.reward_workers",
    "trainer.timeout_minutes",
    "logger.rollouts_every",
    "logger.groups",
    "checkpoint",
    "resilience",
)
"""Keys without effect in NeMo-RL, which for example verifies and writes checkpoints in its own way."""


def overrides(
    config: RunConfig, *, train: Path, evaluate: Path | None, eval_prompts: int, stop_ids: Sequence[int]
) -> list[str]:
    """The overrides that stand for ``config``.

    ``train``, ``evaluate``: files of rendered prompts, of which the latter holds ``eval_prompts``. ``stop_ids``: ids of
    the tokens that end a response.
    """
    settings = {
        **_grpo(config, eval_prompts),
        **_loss(config),
        **_policy(config),
        **_megatron(config),
        **_generation(config, stop_ids),
        **_data(train, evaluate),
        **_files(config),
        "cluster.num_nodes": config.cluster.nodes,
        "cluster.gpus_per_node": config.cluster.gpus_per_node,
    }
    return [override(key, value, add=True) for key, value in settings.items()]


def _grpo(config: RunConfig, eval_prompts: int) -> dict[str, Any]:
    trainer, algo = config.trainer, config.algo
    settings = {
        "num_prompts_per_step": trainer.prompts_per_step,
        "num_generations_per_prompt": config.rollout.group_size,
        "max_num_steps": trainer.steps,
        "max_num_epochs": 1_000,  # steps end the run
        "val_period": trainer.eval_every if eval_prompts else 0,  # not without prompts
        "val_at_start": eval_prompts > 0,
        "val_at_end": eval_prompts > 0,
        "max_val_samples": eval_prompts,
        "val_batch_size": eval_prompts,
        "overlong_filtering": algo.overlong_filter,
        "seed": trainer.seed,
        "reward_shaping.enabled": algo.overlong_buffer > 0,
        "reward_shaping.overlong_buffer_length": algo.overlong_buffer,
        "reward_shaping.overlong_buffer_penalty": algo.overlong_penalty,
        "reward_shaping.max_response_length": config.rollout.max_new_tokens,
        **ESTIMATORS[algo.estimator],
    }
    return {f"grpo.{name}": value for name, value in settings.items()}


def _loss(config: RunConfig) -> dict[str, Any]:
    algo = config.algo
    settings: dict[str, Any] = {
        "ratio_clip_min": algo.clip_low,
        "ratio_clip_max": algo.clip_high,
        "token_level_loss": algo.aggregation == "token_mean",
        "reference_policy_kl_penalty": algo.kl_coef,
        "reference_policy_kl_type": algo.kl_estimator,
        "use_kl_in_reward": algo.kl_in == "reward",
        **LOSSES[algo.loss],
        **{f"echorl.{name}": value for name, value in asdict(config.echorl).items()},
    }
    if algo.tis_cap is not None:
        settings |= {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": algo.tis_cap,
        }
    if algo.icepop_low is not None or algo.icepop_high is not None:
        settings |= {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": algo.icepop_high,
            "truncated_importance_sampling_ratio_min": algo.icepop_low,
        }
    return {f"loss_fn.{name}": value for name, value in settings.items()}


def _policy(config: RunConfig) -> dict[str, Any]:
    trainer, layout = config.trainer, config.parallel
    settings = {
        "model_name": config.model.path,
        "tokenizer.name": config.model.path,
        "tokenizer.chat_template": None,  # the prompts are rendered already
        "train_global_batch_size": trainer.minibatch_prompts * config.rollout.group_size,
        "train_micro_batch_size": trainer.micro_batch_size,
        "logprob_batch_size": trainer.micro_batch_size,
        "max_total_sequence_length": config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        "max_grad_norm": trainer.clip_grad,
        # sequences are split in twice as many chunks as there are context-parallel ranks
        "make_sequence_length_divisible_by": layout.tensor * (2 * layout.context if layout.context > 1 else 1),
    }
    settings["sequence_packing.enabled"] = trainer.pack_tokens > 0
    if trainer.pack_tokens:
        settings |= {
            "sequence_packing.train_mb_tokens": trainer.pack_tokens,
            "sequence_packing.logprob_mb_tokens": trainer.pack_tokens,
        }
    return {f"policy.{name}": value for name, value in settings.items()}


def _megatron(config: RunConfig) -> dict[str, Any]:
    trainer, layout = config.trainer, config.parallel
    settings = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "sequence_parallel": layout.sequence and layout.tensor > 1,
        "activation_checkpointing": trainer.recompute != "none",
        "recompute_granularity": "full" if trainer.recompute == "none" else trainer.recompute,
        "optimizer.lr": trainer.lr,
        "optimizer.min_lr": trainer.lr,
        "optimizer.weight_decay": trainer.weight_decay,
        "optimizer.adam_beta1": trainer.adam_beta1,
        "optimizer.adam_beta2": trainer.adam_beta2,
        "optimizer.adam_eps": trainer.adam_eps,
        # NeMo-RL counts training steps, which have several optimizer steps
        "scheduler.lr_warmup_iters": math.ceil(
            trainer.warmup_steps * trainer.minibatch_prompts / trainer.prompts_per_step
        ),
        "scheduler.lr_warmup_init": 0.0,
        "scheduler.lr_decay_iters": max(1_000_000, trainer.warmup_steps + 1),
    }
    for name, layers in (("first", layout.first_stage_layers), ("last", layout.last_stage_layers)):
        if layers is not None:
            settings[f"num_layers_in_{name}_pipeline_stage"] = layers
    return {f"policy.megatron_cfg.{name}": value for name, value in settings.items()}


def _generation(config: RunConfig, stop_ids: Sequence[int]) -> dict[str, Any]:
    rollout = config.rollout
    settings: dict[str, Any] = {
        "backend": rollout.engine,
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k or None,
        "stop_token_ids": list(stop_ids) or None,
    }
    if rollout.engine == "vllm":
        settings["vllm_cfg.tensor_parallel_size"] = rollout.vllm.tensor_parallel or config.parallel.tensor
        settings["vllm_cfg.gpu_memory_utilization"] = rollout.vllm.gpu_memory_share
    return {f"policy.generation.{name}": value for name, value in settings.items()}


def _data(train: Path, evaluate: Path | None) -> dict[str, Any]:
    def source(path: Path) -> dict[str, Any]:
        return {
            "dataset_name": "ResponseDataset",
            "data_path": str(path),
            "input_key": "prompt",
            "output_key": "answer",
            "split_validation_size": 0,
        }

    return {
        **{f"data.train.{name}": value for name, value in source(train).items()},
        "data.validation": source(evaluate) if evaluate else None,
        "data.default.prompt_file": None,
        "data.default.system_prompt_file": None,
    }


def _files(config: RunConfig) -> dict[str, Any]:
    folder, logger = Path(config.trainer.run_dir), config.logger
    settings = {
        "checkpointing.enabled": True,
        "checkpointing.checkpoint_dir": str(folder / "checkpoints"),
        "checkpointing.save_period": config.trainer.save_every or config.trainer.steps,
        "checkpointing.metric_name": "val:accuracy" if config.data.eval else None,
        "logger.log_dir": str(folder / "logs"),
        "logger.tensorboard_enabled": logger.tensorboard,
        "logger.wandb_enabled": logger.wandb_project is not None,
        "logger.mlflow_enabled": logger.mlflow_experiment is not None,
    }
    if logger.wandb_project is not None:
        settings["logger.wandb.project"] = logger.wandb_project
    if logger.mlflow_experiment is not None:
        settings["logger.mlflow.experiment_name"] = logger.mlflow_experiment
    return settings
