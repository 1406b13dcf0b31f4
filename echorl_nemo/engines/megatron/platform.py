"""The hardware of a run: GPU or CPU, with the settings that differ between them."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from echorl_nemo.engines.megatron import cpu
from echorl_nemo.errors import UserError
from echorl_nemo.releases import has_transformer_engine


@dataclass(frozen=True)
class Platform:
    """The hardware that the ranks run on, and the settings that follow from it."""

    backend: str
    """torch.distributed backend."""
    dtype: torch.dtype
    """Type of the policy's weights and activations."""
    start_method: str
    """Start method of multiprocessing for the ranks that this program starts."""
    transformer_engine: bool
    """Whether the layers are Transformer Engine's; otherwise they are Megatron's local ones."""
    provider_overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of Megatron-Bridge's model provider on this hardware."""

    def device(self) -> torch.device:
        """Make this rank's GPU the current device, and return it; on the CPU only return that."""
        if self.backend == "gloo":
            return torch.device("cpu")
        # if each task sees only its own GPU, that one is number 0
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
    """The platform for ``device``, the value of `parallel.device`. Installs the stand-ins that the platform needs.

    Raises UserError for `cuda` without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("parallel.device=cuda: torch finds no GPU; use auto or cpu")
    if device == "cpu" or not has_gpu:
        cpu.install_stand_ins(replace_cuda=True)
        return Platform(
            backend="gloo",
            dtype=torch.float32,
            start_method="fork",
            transformer_engine=False,
            provider_overrides={**cpu.NO_FUSED_KERNELS, "use_cpu_initialization": True},
        )
    transformer_engine = has_transformer_engine()
    if not transformer_engine:
        cpu.install_stand_ins(replace_cuda=False)
    return Platform(
        backend="nccl",
        dtype=torch.bfloat16,
        start_method="spawn",
        transformer_engine=transformer_engine,
        provider_overrides={} if transformer_engine else cpu.NO_FUSED_KERNELS,
    )
