"""All stand-ins that NeMo-Aligner 0.7, NeMo 2.1 and Megatron-Core 0.10 need on a machine without a GPU. In the NGC
container none of them is used.

The libraries' own code runs: model, tensor and pipeline parallelism, schedules, generation, trainer, checkpoints.
Replaced are: the CUDA device (by the CPU), NeMo's packages that re-export everything below them (by ones that import a
name at its first use, so that speech and multimodal code is not imported), TensorRT-LLM and NeMo's export (absent),
layers and norms of apex and Transformer Engine (by torch's), Lightning's strategy (gloo instead of NCCL), and a call
into torch's checkpoint writer whose arguments have changed.
"""

import ast
import importlib
import importlib.machinery
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from echorl_nemo.engines.fused_adam import GroupStepAdamW

RE_EXPORTING = (
    "nemo.collections.nlp",
    "nemo.collections.nlp.models",
    "nemo.collections.nlp.data",
    "nemo.collections.nlp.modules",
    "nemo.collections.nlp.losses",
    "nemo.collections.nlp.models.language_modeling",
    "nemo.collections.nlp.modules.common",
    "nemo.collections.nlp.data.language_modeling",
    "nemo.collections.nlp.data.language_modeling.megatron",
)
"""Packages of NeMo whose __init__ imports everything below them."""

ABSENT: dict[str, tuple[str, ...]] = {
    "tensorrt_llm": (),
    "nemo.export": (),
    "nemo.export.tensorrt_llm": ("TensorRTLLM",),
    "nemo.export.trt_llm": (),
    "nemo.export.trt_llm.tensorrt_llm_run": (),
    "nemo.export.trt_llm.nemo_ckpt_loader": (),
    "nemo.export.trt_llm.nemo_ckpt_loader.nemo_file": ("build_tokenizer",),
}
"""Modules that nemo_aligner.utils.trt_llm imports before it checks that they exist, with the names it imports."""

_installed: list[object] = []


def install_stand_ins() -> None:
    """Put the stand-ins in place, once in each process; a forked rank inherits them. Does nothing if there is a GPU.

    Must be called before NeMo-Aligner is imported.
    """
    if _installed or torch.cuda.is_available():
        return
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "")  # NeMo matches it against a pattern
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # NeMo keeps its configuration in checkpoints
    warnings.filterwarnings("ignore")
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)
    _replace_cuda()
    _replace_collectives()
    for name in RE_EXPORTING:
        _replace_by_lazy_package(name)
    for name, attributes in ABSENT.items():
        _make_module(name, [], {attribute: _absent(f"{name}.{attribute}") for attribute in attributes})
    importlib.import_module("nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor")
    _replace_random_state()
    _replace_apex_and_transformer_engine()
    _replace_strategy()
    _write_checkpoints_with_new_torch()
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)


class _CudaMeansCpu(TorchFunctionMode):
    """Makes `device="cuda"` mean the CPU in the libraries' calls."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class _Stream:
    """A CUDA stream without effect: the CPU runs everything in order."""

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...


def _replace_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.mem_get_info = lambda *args, **kwargs: (0, 0)
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _returns(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _returns(0))
    for name in ("Float", "Long", "Byte", "Bool", "Int", "Half", "BFloat16", "Double"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    setattr(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _replace_collectives() -> None:
    """Give inputs without dimensions one before they are gathered: gloo refuses those of rebalance_nd_tensor."""
    gather = dist.all_gather_into_tensor

    def gather_with_dimension(output: Any, input_: Any, *args: Any, **kwargs: Any) -> Any:
        return gather(output, input_.view(1) if input_.dim() == 0 else input_, *args, **kwargs)

    setattr(dist, "all_gather_into_tensor", gather_with_dimension)  # noqa: B010


def _replace_by_lazy_package(name: str) -> None:
    """Replace the package ``name`` by one that imports each name which its __init__ re-exports at the first use."""
    import nemo.collections  # noqa: F401

    folder = Path(sys.modules["nemo"].__path__[0]).joinpath(*name.split(".")[1:])
    exports: dict[str, str] = {}
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            source = f"{name}.{node.module}" if node.level else node.module
            exports |= {alias.asname or alias.name: source for alias in node.names}

    def find(attribute: str) -> Any:
        if attribute not in exports:
            raise AttributeError(f"{name}.{attribute}")
        source = exports[attribute]
        if source == name:
            return importlib.import_module(f"{source}.{attribute}")
        return getattr(importlib.import_module(source), attribute)

    _make_module(name, [str(folder)], {"__getattr__": find})


def _make_module(name: str, path: list[str], attributes: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__path__ = path
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__spec__.submodule_search_locations = path
    module.__dict__.update(attributes)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)


def _absent(name: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{name} comes with the NGC container and is not on this machine; set trt_llm.enable=false")

    return type(name.rpartition(".")[2], (), {"__init__": refuse})


def _replace_random_state() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random
    from nemo.collections.nlp.modules.common.megatron import megatron_init

    random._set_cuda_rng_state = lambda state, device=-1: torch.set_rng_state(state)
    seed_without_tracker = megatron_init._set_random_seed

    def seed(value: int) -> None:
        """Seed the tensor-parallel tracker too, which NeMo does only if torch counts a CUDA device."""
        seed_without_tracker(value)
        tensor_parallel.model_parallel_cuda_manual_seed(value + 100 * megatron_init.get_pipeline_model_parallel_rank())

    megatron_init._set_random_seed = seed


def _replace_apex_and_transformer_engine() -> None:
    """Give NeMo the parts of Megatron-Core and torch that do what it takes from apex and Transformer Engine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.collections.nlp.models import nlp_model
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.modules.common.megatron import build_model, clip_grads, utils
    from nemo.collections.nlp.parts import nlp_overrides
    from nemo.core.classes.modelPT import ModelPT
    from nemo.core.optim import optimizers
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    megatron_gpt_model.get_specs = lambda *args, **kwargs: get_gpt_layer_local_spec()
    nlp_model.get_megatron_pretrained_bert_models = list
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )
    utils.FusedLayerNorm = utils.FastLayerNorm = torch.nn.LayerNorm
    utils.MixedFusedRMSNorm = torch.nn.RMSNorm
    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    ModelPT.cuda = lambda self, *args, **kwargs: self
    nlp_overrides.HAVE_APEX = clip_grads.HAVE_APEX = optimizers.HAVE_APEX = True
    # torch's keeps a step for each parameter, which Megatron-Core 0.10 cannot save
    optimizers.FusedAdam = optimizers.AVAILABLE_OPTIMIZERS["adamw"] = GroupStepAdamW
    nlp_overrides.McoreDistributedOptimizer = McoreDistributedOptimizer
    nlp_overrides.MegatronDistributedFusedAdam = _absent("apex.contrib.optimizers.DistributedFusedAdam")
    clip_grads.amp_C = _MultiTensor
    clip_grads.multi_tensor_applier = lambda function, buffer, lists, *args: function(lists, *args)


class _MultiTensor:
    """The functions of apex's amp_C that NeMo's gradient clipping calls."""

    @staticmethod
    def multi_tensor_l2norm(lists: list[list[torch.Tensor]], *args: Any) -> tuple[torch.Tensor, None]:
        return torch.linalg.vector_norm(torch.stack([grad.norm() for grad in lists[0]])), None

    @staticmethod
    def multi_tensor_scale(lists: list[list[torch.Tensor]], factor: float) -> None:
        for source, target in zip(*lists, strict=True):
            target.copy_(source * factor)


def _replace_strategy() -> None:
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
    from nemo.collections.nlp.parts import megatron_trainer_builder
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    def gloo_strategy(self: Any) -> Any:
        launchers = (TorchElasticEnvironment, SLURMEnvironment)
        launcher: type = next((each for each in launchers if each.detect()), LightningEnvironment)
        return NLPDDPStrategy(
            process_group_backend="gloo",
            cluster_environment=launcher(),
            no_ddp_communication_hook=True,
            find_unused_parameters=False,
        )

    megatron_trainer_builder.MegatronTrainerBuilder._training_strategy = gloo_strategy


def _write_checkpoints_with_new_torch() -> None:
    """Adapt a call of Megatron-Core 0.10 into torch's checkpoint writer, whose arguments have changed since."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    def write_item(stream: Any, data: Any, item: Any, key: str) -> Any:
        transforms = filesystem._StorageWriterTransforms()
        return filesystem._write_item(transforms, stream, data, item, key, filesystem.SerializationFormat.TORCH_SAVE)

    setattr(filesystem_async, "_write_item", write_item)  # noqa: B010
