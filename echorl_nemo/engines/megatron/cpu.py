"""All stand-ins that Megatron-Core and Megatron-Bridge need on a machine without a GPU, or without Transformer Engine.

The libraries' own code runs: model, parallel layers, pipeline schedules, distributed optimizer, checkpoints,
inference context. Replaced are: the CUDA device (by the CPU), CUDA streams and random states, packages that
Megatron-Bridge imports but does not use here (`ABSENT_PACKAGES`), the optimizer (by an AdamW that keeps its step count
where Megatron's checkpoints look for it), and what Megatron leaves to Transformer Engine: attention over packed rows
and under context parallelism, norms under sequence parallelism.
"""

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from echorl_nemo.engines.fused_adam import GroupStepAdamW
from echorl_nemo.engines.megatron.zigzag import natural_order
from echorl_nemo.releases import import_before_absent_packages

ABSENT_PACKAGES: tuple[str, ...] = (
    "transformer_engine", "transformer_engine_torch", "mamba_ssm", "causal_conv1d", "fla", "nvidia_resiliency_ext",
    "qwen_vl_utils", "timm", "open_clip", "mlflow", "wandb", "modelopt",
)  # fmt: skip
"""Packages that Megatron-Bridge imports at module level. Those that are not installed get an empty stand-in."""

NO_FUSED_KERNELS: dict[str, Any] = {
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
}
"""Settings of Megatron-Bridge's model provider that turn off the fused kernels of Transformer Engine and apex."""

_installed: list[object] = []


def install_stand_ins(*, replace_cuda: bool) -> None:
    """Put the stand-ins in place, once in each process; a forked rank inherits them.

    The optimizer, packed attention and the absent packages are always replaced; with ``replace_cuda`` also the CUDA
    device.
    """
    if _installed:
        return
    if replace_cuda:
        _replace_cuda()
    _import_megatron_core()
    _replace_adam()
    _attend_to_packed_and_split_rows()
    _norm_under_sequence_parallelism()
    _route_without_transformer_engine()
    sys.meta_path.append(_AbsentPackageFinder())
    _installed.append(_AbsentPackageFinder)
    if replace_cuda:
        _replace_random_state()
        _send_contiguous_shards()
        _split_by_numbers()
        mode = _CudaMeansCpu()
        mode.__enter__()
        _installed.append(mode)


class _CudaMeansCpu(TorchFunctionMode):
    """Makes `device="cuda"` mean the CPU in Megatron's calls."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # needs a device
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the distributed optimizer recognises its parameters by torch.cuda.FloatTensor
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _Stream:
    """A CUDA stream without effect: the CPU runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_Stream":
        return self  # the caller may wait for the event

    def synchronize(self) -> None: ...


def _replace_cuda() -> None:
    def nothing() -> Callable[..., None]:
        return lambda *args, **kwargs: None  # a new one each time: torch.compile refuses two names of one function

    stand_ins: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "Stream": _Stream,  # a class, as others annotate with it
        "current_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda *args, **kwargs: nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)


def _import_megatron_core() -> None:
    """Import Megatron-Core before the stand-in packages exist, so that it sees that the packages are absent."""
    for module in (
        "models.gpt", "models.gpt.gpt_layer_specs", "optimizer", "distributed", "pipeline_parallel",
        "dist_checkpointing", "transformer.multi_latent_attention", "inference.contexts",
        "inference.communication_utils", "transformer.moe.moe_layer", "transformer.moe.experts",
        "transformer.moe.moe_utils", "transformer.moe.router",
    ):  # fmt: skip
        importlib.import_module(f"megatron.core.{module}")
    import_before_absent_packages()


def _replace_random_state() -> None:
    from megatron.core.tensor_parallel import random

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_state(device: str = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    random._set_cuda_rng_state = set_state
    random._get_cuda_rng_state = get_state


def _replace_adam() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True


def _attend_to_packed_and_split_rows() -> None:
    """Run Megatron's own attention, which refuses packed rows and context parallelism, on each sequence of a packed row
    separately; under context parallelism on the keys and values of the whole context group, in natural order."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    make, attend = DotProductAttention.__init__, DotProductAttention.forward

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        unsplit = copy.copy(config)
        unsplit.context_parallel_size = 1
        make(self, unsplit, *args, **kwargs)
        self.model_config = config  # `whole_sequences` changes its context_parallel_size

    def forward(
        self: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        packed, parts = kwargs.pop("packed_seq_params", None), self.model_config.context_parallel_size
        if packed is None and parts == 1:
            return attend(self, query, key, value, attention_mask, *args, **kwargs)
        sizes = [parts * len(query)]
        if packed is not None:
            sizes = packed.cu_seqlens_q.diff().tolist()
            # [tokens, heads, width] of the row; [tokens, 1, heads, width] of a sequence
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
        if parts > 1:
            order = natural_order(sizes, parts).to(key.device)
            key, value = (_whole_context(part)[order] for part in (key, value))
        outputs = []
        for q, k, v in zip(
            query.split([size // parts for size in sizes]), key.split(sizes), value.split(sizes), strict=True
        ):
            for chunk, end in _chunks(q, parts):
                mask = attention_mask if parts == 1 else _later_keys(len(chunk), end, q.device)
                outputs.append(attend(self, chunk, k[:end], v[:end], mask, *args, **kwargs))
        return torch.cat(outputs)

    DotProductAttention.__init__, DotProductAttention.forward = init, forward


def _whole_context(part: torch.Tensor) -> torch.Tensor:
    """Keys or values [tokens of a rank, ...] of the context-parallel ranks, one rank after the other. The backward adds
    up what each rank's queries ask of them."""
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    whole: torch.Tensor = gather_from_sequence_parallel_region(part.contiguous(), group=get_context_parallel_group())
    return whole


def _chunks(query: torch.Tensor, parts: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The queries of a sequence that follow each other, with the number of keys up to the last of them."""
    if parts == 1:
        yield query, len(query)
        return
    from megatron.core.parallel_state import get_context_parallel_rank

    rank, size = get_context_parallel_rank(), len(query) // 2
    for chunk, number in zip(query.split(size), (rank, 2 * parts - 1 - rank), strict=True):
        yield chunk, (number + 1) * size


def _later_keys(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[1, 1, queries, keys] bool: the keys behind each query, where the last query stands at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)[None, None]


def _norm_under_sequence_parallelism() -> None:
    """Let Megatron's torch norms work under sequence parallelism, which they refuse: mark their weights, as Transformer
    Engine's norms do, so that the gradients are summed over the ranks that hold different positions."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return make(cls, config, *args, **kwargs)
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        norm = make(cls, unsplit, *args, **kwargs)
        for weight in norm.parameters():
            weight.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = new


def _route_without_transformer_engine() -> None:
    """Define the name of Transformer Engine's matrix product, which Megatron's router reads; None selects torch's."""
    from megatron.core.transformer.moe import moe_utils

    vars(moe_utils).setdefault("te_general_gemm", None)


def _send_contiguous_shards() -> None:
    """Make shards contiguous before a scatter: gloo sends a non-contiguous one as if it were contiguous, so that
    row-parallel weights would arrive wrong."""
    scatter = dist.scatter

    def contiguous_scatter(tensor: Any, scatter_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        shards = [shard.contiguous() for shard in scatter_list] if scatter_list else scatter_list
        return scatter(tensor, shards, *args, **kwargs)

    dist.scatter = contiguous_scatter


def _split_by_numbers() -> None:
    """Turn the sizes that experts exchange into numbers, which Megatron does only while it copies them off a GPU."""
    exchange = dist.all_to_all_single

    def all_to_all_single(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        sizes = [part.tolist() if hasattr(part, "tolist") else part for part in (output_split_sizes, input_split_sizes)]
        return exchange(output, input, *sizes, **kwargs)

    setattr(dist, "all_to_all_single", all_to_all_single)  # noqa: B010  of another signature


class _AbsentModule(types.ModuleType):
    """The stand-in of a module: every attribute exists, and none can be used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name.islower():
            value = _AbsentModule(f"{self.__name__}.{name}")
        else:
            value = type(name, (_AbsentClass,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _AbsentClass:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{type(self).__module__}.{type(self).__name__} needs a GPU machine with that package")


class _AbsentPackageFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty stand-in for an absent package. It is the last finder, so that an installed package wins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] in ABSENT_PACKAGES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _AbsentModule(spec.name)
        module.__path__ = []
        setattr(module, "__version__", "0.0.0")  # noqa: B010  not an attribute of every module
        if spec.name == "modelopt.torch.quantization.utils":
            setattr(module, "is_quantized", lambda model: False)  # noqa: B010  Megatron-Bridge asks before it exports
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...
