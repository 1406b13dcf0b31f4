"""Translates a RunConfig into overrides of NeMo-Aligner's configuration, conf/nemo_aligner/echo_grpo_actor.yaml."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from echorl_nemo.engines.hydra_overrides import override
from echorl_nemo.schema import RunConfig

CONFIG_NAME = "echo_grpo_actor"
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen"}
"""Architectures that NeMo 2.1 converts (`convert_{llama,qwen2}_hf_to_nemo.py`), with TensorRT-LLM's names for them."""

UNREAD = (
    "model.keep_special_tokens",
    "data.solutions",
    "rollout.check_share",
    "trainer.adam_eps",
    "trainer.timeout_minutes",
    "logger.rollouts_every",
    "logger.groups",
    "checkpoint",
    "resilience",
)
"""Keys without effect in NeMo-Aligner, which for example writes checkpoints in its own way."""


def overrides(
    config: RunConfig, model_type: str, *, train: Path, evaluate: Path | None, eval_prompts: int, eos: Sequence[str]
) -> list[str]:
    """The overrides that stand for ``config``.

    ``train``, ``evaluate``: files of rendered prompts, of which the latter holds ``eval_prompts``. ``eos``: texts of
    the tokens that end a response. All sizes in `config.parallel` must be resolved, `data` included.
    """
    settings = {
        **_trainer(config, model_type),
        **_parallel(config),
        **_step(config, eval_prompts),
        "pretrained_checkpoint.restore_from_path": config.model.nemo_path,
        "data.train": str(train),
        "data.validation": str(evaluate or train),
        # a separate folder: exp_manager moves the files that it finds in it
        "exp_manager.explicit_log_dir": str(Path(config.trainer.run_dir) / "nemo_aligner"),
        "exp_manager.create_wandb_logger": config.logger.wandb_project is not None,
        "verifier.name": config.data.reward,
        "verifier.workers": config.data.reward_workers,
        "verifier.timeout": config.data.reward_timeout,
        "model.grpo.sampling_params.temperature": config.rollout.temperature,
        "model.grpo.sampling_params.top_p": config.rollout.top_p,
        "model.grpo.sampling_params.top_k": config.rollout.top_k,
        "model.grpo.sampling_params.end_strings": list(eos),
    }
    if config.logger.wandb_project is not None:
        settings["exp_manager.wandb_logger_kwargs.project"] = config.logger.wandb_project
    # one dictionary: the name of a user's function holds dots and a colon
    added: dict[str, Any] = {"verifier.extra": {extra.name: extra.weight for extra in config.data.extra_rewards}}
    added |= {f"model.echorl.{name}": value for name, value in asdict(config.echorl).items()}
    added |= {f"model.grpo.algo.{name}": value for name, value in asdict(config.algo).items()}
    return [
        *(["optim@model.optim=adamw"] if config.parallel.device == "cpu" else []),
        *(override(key, value) for key, value in settings.items()),
        *(override(key, value, add=True) for key, value in added.items()),
    ]


def _trainer(config: RunConfig, model_type: str) -> dict[str, Any]:
    trainer, cpu = config.trainer, config.parallel.device == "cpu"
    every = trainer.save_every or trainer.eval_every or 10
    return {
        "trainer.num_nodes": config.cluster.nodes,
        "trainer.devices": config.cluster.gpus_per_node,
        "trainer.accelerator": "cpu" if cpu else "gpu",
        "trainer.precision": 32 if cpu else "bf16",
        "trainer.grpo.max_steps": trainer.steps,
        "trainer.grpo.max_epochs": 1_000,  # steps end the run
        "trainer.grpo.val_check_interval": trainer.eval_every or every,
        "trainer.grpo.save_interval": every,
        "trainer.grpo.gradient_clip_val": trainer.clip_grad,
        "trainer.grpo.num_rollouts_per_prompt": config.rollout.group_size,
        "trainer.grpo.trt_llm.enable": config.rollout.engine == "trtllm",
        "trainer.grpo.trt_llm.reshard": config.parallel.pipeline > 1,
        "trainer.grpo.trt_llm.unload_engine_train": config.rollout.engine == "trtllm",
        "trainer.grpo.trt_llm.model_type": MODEL_TYPES.get(model_type, model_type),
        "model.megatron_amp_O2": not cpu,
        "model.optim.lr": trainer.lr,
        "model.optim.weight_decay": trainer.weight_decay,
        "model.optim.betas": [trainer.adam_beta1, trainer.adam_beta2],
        "model.seed": trainer.seed + 1,  # NeMo refuses 0
    }


def _parallel(config: RunConfig) -> dict[str, Any]:
    recompute = None if config.trainer.recompute == "none" else config.trainer.recompute
    settings = {
        "model.tensor_model_parallel_size": config.parallel.tensor,
        "model.pipeline_model_parallel_size": config.parallel.pipeline,
        "model.sequence_parallel": config.parallel.sequence and config.parallel.tensor > 1,
        "++model.activations_checkpoint_granularity": recompute,
        "++model.activations_checkpoint_method": "uniform" if recompute else None,
    }
    if recompute == "full":
        settings["++model.activations_checkpoint_num_layers"] = 1
    return settings


def _step(config: RunConfig, eval_prompts: int) -> dict[str, Any]:
    """Batch sizes: prompts or rollouts in a step, an optimizer step, a generation and a forward."""
    trainer, group_size, data = config.trainer, config.rollout.group_size, config.parallel.data or 1
    # TensorRT-LLM generates with tensor parallelism only: pipeline stages become further replicas
    replicas = data * (config.parallel.pipeline if config.rollout.engine == "trtllm" else 1)
    at_a_time = _largest_divisor(
        trainer.prompts_per_step // replicas, at_most=max(1, config.rollout.batch_size // group_size)
    )
    validated = eval_prompts // (at_a_time * replicas) * at_a_time * replicas or trainer.prompts_per_step
    return {
        "model.encoder_seq_length": config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        "model.grpo.length_params.max_length": config.rollout.max_new_tokens,
        "model.grpo.num_rollout_samples": trainer.prompts_per_step,
        "model.grpo.num_val_samples": validated,
        "model.grpo.rollout_micro_batch_size": at_a_time,
        "model.grpo.val_rollout_micro_batch_size": at_a_time,
        "model.grpo.forward_micro_batch_size": trainer.micro_batch_size,
        "model.grpo.offload_adam_states": config.parallel.device != "cpu",
        "model.micro_batch_size": trainer.micro_batch_size,
        "model.global_batch_size": trainer.minibatch_prompts * group_size,
    }


def _largest_divisor(number: int, *, at_most: int) -> int:
    return max((size for size in range(1, min(number, at_most) + 1) if number % size == 0), default=1)
