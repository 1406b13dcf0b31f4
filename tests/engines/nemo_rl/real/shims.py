"""All shims under which NeMo-RL's real driver and Megatron workers run without a GPU.

`install` must be called in each process before anything imports Megatron. It adds to the native engine's stand-ins
(`echorl_nemo.engines.megatron.cpu`): gloo for NCCL, a GPU that answers NeMo-RL's questions, Megatron-Bridge without
CUDA, and nothing in place of NVML and ModelOpt. NeMo-RL's, Ray's and Megatron's own code runs.
"""

import functools
import importlib
import inspect
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from echorl_nemo.engines.fused_adam import GroupStepAdamW
from echorl_nemo.engines.megatron import cpu

MORE_ABSENT = ("nemo_automodel", "deep_ep", "megatron_energon", "decord", "av", "cupy")
"""Further packages that NeMo-RL's Megatron-Bridge imports at module level and does not use here."""
MEMORY_BYTES = 8 << 30
"""Memory of the GPU that does not exist."""


def install() -> None:
    """Put the shims in place, once in each process; a forked rank inherits them."""
    if cpu._installed:
        return
    cpu.ABSENT_PACKAGES = cpu.ABSENT_PACKAGES + MORE_ABSENT
    named = cpu._is_cuda
    # NeMo-RL gives devices as numbers too
    cpu._is_cuda = lambda device: named(device) or type(device) is int
    cpu.install_stand_ins(replace_cuda=True)
    _answer_for_a_gpu()
    _gloo_for_nccl()
    _bridge_without_cuda()
    _nemo_rl_without_nvml()
    _attach_submodules()


SUSPENDED = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
"""Kinds of methods that go on later, under whatever mode is then entered; they stay as they are."""


class _Event:
    """A CUDA event without effect."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _answer_for_a_gpu() -> None:
    card = SimpleNamespace(
        total_memory=MEMORY_BYTES, multi_processor_count=1, major=8, minor=0, name="cpu", uuid="cpu"
    )  # fmt: skip
    answers: dict[str, Any] = {
        "current_device": lambda: int(os.environ.get("LOCAL_RANK", "0")),  # NeMo-RL asserts that it is the local rank
        "device_count": lambda: 1,
        "get_device_name": lambda *args, **kwargs: "cpu",
        "get_device_capability": lambda *args, **kwargs: (8, 0),
        "get_device_properties": lambda *args, **kwargs: card,
        "mem_get_info": lambda *args, **kwargs: (MEMORY_BYTES // 2, MEMORY_BYTES),
        "memory_stats": lambda *args, **kwargs: {},
        "Event": _Event,
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = lambda *args, **kwargs: 0
    for name in ("reset_peak_memory_stats", "ipc_collect", "set_per_process_memory_fraction"):
        answers[name] = lambda *args, **kwargs: None
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # Megatron's buffers are kept by .cpu().pin_memory() and then freed; here .cpu() is the same storage
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self.clone()  # type: ignore[method-assign]


def _gloo_for_nccl() -> None:
    init, new = dist.init_process_group, dist.new_group

    def gloo(backend: Any) -> Any:
        return "gloo" if backend is None or "nccl" in str(backend) else backend

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        if dist.is_initialized():  # the ranks of a test have a world already
            return None
        return init(gloo(backend), *args, **kwargs)

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        return new(ranks, timeout, gloo(backend), None, *args, **kwargs)

    dist.init_process_group, dist.new_group = init_process_group, new_group


def _bridge_without_cuda() -> None:
    from megatron.bridge.models import gpt_provider
    from megatron.bridge.training import checkpointing, initialize
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    gpt_provider.transformer_engine_layer_spec = gpt_provider.local_layer_spec
    initialize.set_jit_fusion_options = lambda *args, **kwargs: None  # would compile for minutes
    initialize.compile_helpers = lambda: None  # of data sets, which are not used
    initialize.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for name in list(vars(checkpointing)):
        if name.endswith("modelopt_state"):  # nothing is quantised: there is no state to save or restore
            setattr(checkpointing, name, lambda *args, **kwargs: None)
    optimizer.Adam = distrib_optimizer.Adam = _Adam


class _Adam(GroupStepAdamW):
    """Without the arguments that Megatron-Core 0.20 gives only to an Adam of a GPU, such as `capturable`."""

    def __init__(self, params: Any, **given: Any) -> None:
        known = inspect.signature(GroupStepAdamW.__init__).parameters
        super().__init__(params, **{name: value for name, value in given.items() if name in known})


def _nemo_rl_without_nvml() -> None:
    patches = importlib.import_module("nemo_rl.models.policy.workers.patches")
    nvml = importlib.import_module("nemo_rl.utils.nvml")
    patches.apply_transformer_engine_patch = lambda: None  # type: ignore[attr-defined]
    nvml.get_free_memory_bytes = lambda *args: float(MEMORY_BYTES // 2)  # type: ignore[attr-defined]
    nvml.get_device_uuid = lambda *args: "cpu-" + os.environ.get("RANK", "0")  # type: ignore[attr-defined]
    nvml.log_gpu_memory_diagnostics = lambda *args, **kwargs: None  # type: ignore[attr-defined]


def _attach_submodules() -> None:
    """Make `megatron.core` an attribute of `megatron` again, which an import that failed half-way can leave out."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and name.count(".") == 1:
            setattr(sys.modules["megatron"], name.split(".")[1], module)


def in_every_thread(cls: type) -> type:
    """``cls``, an actor whose methods mean the CPU by `cuda` in whichever thread they run.

    A torch function mode belongs to one thread, and Ray runs the methods of an actor with async methods in threads.
    """

    def under_mode(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch._C._len_torch_function_stack():
                cpu._CudaMeansCpu().__enter__()
            return method(self, *args, **kwargs)

        return call

    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        called = name == "__init__" or not name.startswith("_")
        if called and inspect.isfunction(method) and not any(kind(method) for kind in SUSPENDED):
            setattr(cls, name, under_mode(method))
    return cls
