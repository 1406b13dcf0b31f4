"""Builds Megatron's model on the meta device, where tensors have shapes and no memory, in a fake process group of all
ranks. torchtitan checks layouts without GPUs in the same way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.schema import ParallelConfig


def meta_model(
    bridge: Any,
    layout: ParallelConfig,
    stage: int,
    platform: Platform,
    *,
    adjust: Callable[[Any], None] = lambda provider: None,
) -> Any:
    """The shard of the model that the first rank of pipeline ``stage`` holds, without weights.

    ``bridge`` is Megatron-Bridge's AutoBridge of the model; ``adjust`` changes its provider before the model is built.
    """
    from echorl_nemo.engines.megatron.model import configure  # imports only with the stand-ins of ``platform`` in place

    world = layout.tensor * layout.pipeline * layout.context * (layout.data or 1)
    with _fake_ranks(layout, world, rank=stage * (world // layout.pipeline)):
        provider = bridge.to_megatron_provider(load_weights=False)
        # sequences that are split do not change the weights, and Megatron's own attention refuses them
        configure(provider, replace(layout, context=1), platform)
        adjust(provider)
        provider.perform_initialization = False
        provider.finalize()
        with _on_meta():
            return provider.provide(
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )


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
    """Create all tensors on the meta device, also those for which Megatron asks CUDA for the current device."""
    current = torch.cuda.current_device
    setattr(torch.cuda, "current_device", lambda: torch.device("meta"))  # noqa: B010  Megatron takes what it gets
    try:
        with torch.device("meta"):
            yield
    finally:
        setattr(torch.cuda, "current_device", current)  # noqa: B010
