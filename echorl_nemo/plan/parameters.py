"""Parameters of every pipeline stage's ranks, counted on Megatron's own model.

The policy of one rank of each stage is built on the meta device, where tensors have shapes and no memory, in a fake
process group that stands for all ranks. The method is torchtitan's for checking a layout without its GPUs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.schema import ParallelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class StageParameters:
    """One pipeline stage."""

    rank: int
    """Parameters that each of its ranks holds."""
    expert: int
    """How many of them belong to experts, which are spread over `parallel.expert` ranks."""
    whole: int
    """Parameters of the stage, over all its ranks, each counted once."""
    layers: int
    """Decoder layers."""


def stage_parameters(hf_config: PretrainedConfig, layout: ParallelConfig, platform: Platform) -> list[StageParameters]:
    """The stages of the policy, first to last.

    Each parameter of a rank is compared with its like in a model on one rank. ``layout`` must divide the model. Raises
    AssertionError if a shard is not the whole parameter's size over the ranks that share it.
    """
    from megatron.bridge import AutoBridge  # imports only with the stand-ins that ``platform`` put in place

    # a copy: Megatron-Bridge completes it
    bridge = AutoBridge.from_hf_config(type(hf_config).from_dict(hf_config.to_dict()))
    stages = []
    for stage in range(layout.pipeline):
        shard = _build(bridge, layout, stage, platform)
        alone = replace(layout, tensor=1, context=1, expert=1, data=1, sequence=False)
        whole = _build(bridge, alone, stage, platform)
        stages.append(_compare(shard, whole, layout))
    return stages


def total_parameters(stages: list[StageParameters], hf_config: PretrainedConfig) -> int:
    """Parameters of the model. Tied embeddings are held by the first and the last stage, and counted once."""
    total = sum(stage.whole for stage in stages)
    if hf_config.tie_word_embeddings and len(stages) > 1:
        total -= hf_config.vocab_size * hf_config.hidden_size
    return total


def _compare(shard: Shapes, whole: Shapes, layout: ParallelConfig) -> StageParameters:
    rank = expert = full = 0
    for name, shape in whole.items():
        size = math.prod(shape)
        full += size
        if ".local_experts." in name:
            expert += size
            continue
        own = math.prod(shard[name])
        # the key-value heads that are fewer than the ranks are copied: such a shard is larger than its share
        assert own in (size, size // layout.tensor) or "linear_qkv" in name, f"{name}: {own} of {size}"
        rank += own
    held = sum(math.prod(shape) for name, shape in shard.items() if ".local_experts." in name)
    sharing = layout.expert if layout.expert > 1 else layout.tensor
    assert held * sharing == expert, f"experts: {held} on each of {sharing} ranks, {expert} in all"
    return StageParameters(rank=rank + held, expert=held, whole=full, layers=_layers(shard))


def _layers(shapes: Shapes) -> int:
    return len({name.split(".")[2] for name in shapes if name.startswith("decoder.layers.")})


def _build(bridge: Any, layout: ParallelConfig, stage: int, platform: Platform) -> Shapes:
    """Shapes of the parameters of the first rank of ``stage``."""
    from echorl_nemo.engines.megatron.model import configure  # as above

    data = layout.data or 1
    world = layout.tensor * layout.pipeline * layout.context * data
    with _fake_ranks(layout, world, rank=stage * (world // layout.pipeline)):
        provider = bridge.to_megatron_provider(load_weights=False)
        # sequences that are split do not change the weights, and Megatron's own attention refuses them
        configure(provider, replace(layout, context=1), platform)
        provider.perform_initialization = False
        provider.finalize()
        with _on_meta():
            model = provider.provide(
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@contextmanager
def _fake_ranks(layout: ParallelConfig, world: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1 if layout.expert > 1 else None,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _on_meta() -> Iterator[None]:
    """Megatron asks for the current device by name where it makes a weight."""
    current = torch.cuda.current_device
    setattr(torch.cuda, "current_device", lambda: torch.device("meta"))  # noqa: B010  Megatron takes what it gets
    try:
        with torch.device("meta"):
            yield
    finally:
        setattr(torch.cuda, "current_device", current)  # noqa: B010
