"""What differs between a GPU and a machine without one; everything else in the engine is the same code."""

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Platform:
    """The hardware that ranks run on."""

    backend: str
    """torch.distributed backend."""
    dtype: torch.dtype
    """Of the policy's weights and activations."""
    start_method: str
    """How this program starts its own ranks."""
    transformer_engine: bool
    """Whether layers come from Transformer Engine; Megatron's local ones otherwise."""
    provider_overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of Megatron-Bridge's model provider."""

    def device(self) -> torch.device:
        """This rank's device, made current."""
        if self.backend == "gloo":
            return torch.device("cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())


def detect_platform() -> Platform:
    """The platform of this machine; without a GPU this also puts Megatron's stand-ins in place (`cpu.py`)."""
    if not torch.cuda.is_available():
        from echorl_nemo.engines.megatron import cpu

        cpu.install()
        return Platform(
            backend="gloo",
            dtype=torch.float32,
            start_method="fork",
            transformer_engine=False,
            provider_overrides=cpu.PROVIDER_OVERRIDES,
        )
    return Platform(
        backend="nccl",
        dtype=torch.bfloat16,
        start_method="spawn",
        transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )
