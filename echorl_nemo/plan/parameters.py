"""Counts the parameters of each pipeline stage on Megatron's own model.

The shard of one rank of each stage is built on the meta device, see `engines.megatron.meta_model`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from echorl_nemo.engines.megatron.meta_model import meta_model
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.schema import ParallelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class StageParameters:
    """Parameter counts of one pipeline stage."""

    rank: int
    """Parameters that each of its ranks holds."""
    expert: int
    """Those of them that belong to experts, which are spread over `parallel.expert` ranks."""
    whole: int
    """Parameters of the stage, over all its ranks, each counted once."""
    layers: int
    """Decoder layers of the stage."""


def stage_parameters(hf_config: PretrainedConfig, layout: ParallelConfig, platform: Platform) -> list[StageParameters]:
    """Count the parameters of the policy's stages, first to last.

    Each parameter of a shard is compared with that of a model on one rank. ``layout`` must divide the model. Raises
    AssertionError if the size of a shard is not that of the whole parameter divided by the ranks that share it.
    """
    from megatron.bridge import AutoBridge  # imports only with the stand-ins that ``platform`` put in place

    # a copy, since Megatron-Bridge changes it
    bridge = AutoBridge.from_hf_config(type(hf_config).from_dict(hf_config.to_dict()))
    stages = []
    for stage in range(layout.pipeline):
        shard = _build(bridge, layout, stage, platform)
        unsplit = replace(layout, tensor=1, context=1, expert=1, data=1, sequence=False)
        whole = _build(bridge, unsplit, stage, platform)
        stages.append(_compare(shard, whole, layout))
    return stages


def total_parameters(stages: list[StageParameters], hf_config: PretrainedConfig) -> int:
    """Number of parameters of the model. Tied embeddings are in the first and the last stage, and count once."""
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
    """Shapes of the parameters on the first rank of ``stage``."""
    model = meta_model(bridge, layout, stage, platform)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
