"""The policy's model: imported from a Hugging Face folder into Megatron-Core, and exported, by Megatron-Bridge."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from echorl_nemo.engines.megatron.model_settings import apply_to_provider, attention_settings, set_inverse_frequencies
from echorl_nemo.engines.megatron.parallel import Parallel
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.schema import ModelConfig, ParallelConfig


@dataclass
class PolicyModel:
    """The shard of the policy that this rank holds."""

    bridge: Any
    """Megatron-Bridge's AutoBridge of the Hugging Face model."""
    ddp: Any
    """megatron.core's DistributedDataParallel around the model, or the model itself if it is not trained."""
    config: Any
    """The model's TransformerConfig."""
    parallel: Parallel
    """The process groups that the model is spread over."""
    call_options: dict[str, Any]
    """Arguments of a forward that returns the logits in the precision of the model, not as a float32 copy."""

    @property
    def module(self) -> Any:
        """The model without the wrapper for data parallelism."""
        return self.ddp.module if isinstance(self.ddp, DistributedDataParallel) else self.ddp

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder with the current weights; every rank must call this."""
        self.bridge.save_hf_pretrained([self.module], str(folder), show_progress=False)


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""Megatron's settings for each value of `trainer.recompute`."""


def build_model(
    config: ModelConfig,
    layout: ParallelConfig,
    parallel: Parallel,
    platform: Platform,
    *,
    recompute: str = "none",
    train: bool = True,
) -> PolicyModel:
    """Import the Hugging Face weights into this rank's shard. With ``train`` the shard is wrapped for data-parallel
    training, which allocates a buffer of gradients with 4 bytes a parameter."""
    bridge = AutoBridge.from_hf_pretrained(
        config.path, torch_dtype=platform.dtype, trust_remote_code=config.trust_remote_code
    )
    provider = bridge.to_megatron_provider(load_weights=True)
    configure(provider, layout, platform)
    settings = attention_settings(bridge.hf_pretrained.config)
    if settings is not None:
        apply_to_provider(provider, settings)
    for name, value in RECOMPUTE[recompute].items():
        setattr(provider, name, value)
    provider.finalize()
    ddp = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False
        ),
        use_cpu_initialization=provider.use_cpu_initialization,
        data_parallel_random_init=False,
        wrap_with_ddp=train,
    )
    if settings is not None:
        set_inverse_frequencies(ddp[0], settings)
    return PolicyModel(
        bridge=bridge,
        ddp=ddp[0],
        config=provider,
        parallel=parallel,
        call_options={"fp32_output": False} if provider.bf16 else {},
    )


def configure(provider: Any, layout: ParallelConfig, platform: Platform) -> None:
    """Set this engine's options on a Megatron-Bridge model provider. The caller calls `finalize`."""
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1 if layout.expert > 1 else None,
        "sequence_parallel": layout.sequence and layout.tensor > 1,
        "params_dtype": platform.dtype,
        "pipeline_dtype": platform.dtype,
        "bf16": platform.dtype == torch.bfloat16,
        "fp16": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # Megatron marks a weight as tensor-parallel while it initialises it, and the gradient norm counts a weight
        # without the mark on one rank only: Megatron-Bridge's default for loaded weights would make it too small
        "perform_initialization": True,
        # padded columns would take part in every softmax
        "should_pad_vocab": False,
        # our losses are divided by the counts of the whole step: Megatron must neither average nor rescale them
        "calculate_per_token_loss": True,
        **platform.provider_overrides,
    }
    if provider.num_moe_experts:
        # the loss that balances experts depends on how rollouts are spread over micro-batches and ranks
        settings |= {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_router_dtype": "fp32"}
    for name, value in settings.items():
        setattr(provider, name, value)
    if not platform.transformer_engine:
        provider.transformer_layer_spec = local_layer_spec
