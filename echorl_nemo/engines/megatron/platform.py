"""What differs between a GPU and a machine without one; everything else in the engine is the same code."""

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from echorl_nemo.engines.megatron import cpu
from echorl_nemo.errors import UserError


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
        # where each task sees its own GPU alone, that one is number 0
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())

    def check_devices(self, ranks: int) -> None:
        """Raises UserError if this machine has too few GPUs for ``ranks`` ranks of one program."""
        if self.backend == "nccl" and ranks > torch.cuda.device_count():
            raise UserError(
                f"parallel.*: {ranks} ranks on this machine's {torch.cuda.device_count()} GPUs; use fewer, start them "
                "with torchrun on several machines, or set parallel.device=cpu"
            )


def detect_platform(device: str = "auto") -> Platform:
    """The platform that ``device`` names (`auto`, `cpu`, `cuda`), with the stand-ins that it needs in place.

    Raises UserError for `cuda` without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("parallel.device=cuda: torch finds no GPU; use auto or cpu")
    if device == "cpu" or not has_gpu:
        cpu.install(cuda=True)
        return Platform(
            backend="gloo",
            dtype=torch.float32,
            start_method="fork",
            transformer_engine=False,
            provider_overrides={**cpu.NO_FUSED_KERNELS, "use_cpu_initialization": True},
        )
    transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    if not transformer_engine:
        cpu.install(cuda=False)
    return Platform(
        backend="nccl",
        dtype=torch.bfloat16,
        start_method="spawn",
        transformer_engine=transformer_engine,
        provider_overrides={} if transformer_engine else cpu.NO_FUSED_KERNELS,
    )
