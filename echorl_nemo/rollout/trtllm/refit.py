"""Loading new weights into TensorRT-LLM's model, as its WorkerExtension.update_weights does (llmapi/rlhf_utils.py), in
each generation of its loader; and the check that they arrived.

The loader is asked to load parts, and then says nothing of a weight that finds no place: a model under torch.compile
once lost all of them so, and generated with the old ones. So the first element of each parameter is marked before a
refit, and a mark that is still there afterwards is a parameter that was not loaded.

The module runs in the engine's GPU workers, so that it imports only torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MARKED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of parameters that can hold a NaN as a mark."""
SHOWN = 3
"""Names that an error lists."""


@dataclass
class Refit:
    """A refit under way."""

    kept: dict[str, Tensor]
    """The first element of each marked parameter, by its name in the engine."""
    sent: set[str] = field(default_factory=set)
    """Hugging Face names of the weights that came so far."""


@torch.inference_mode()  # the engine's parameters may be tensors of that mode, which nothing else may change
def begin_refit(model_engine: Any) -> Refit:
    """Prepare the engine's model for new weights, and mark its parameters."""
    call_if_there(model_engine, "unwrap_compiled_model_for_refit")  # since August 2026
    call_if_there(model_engine.model_loader, "begin_update_weights")  # since July 2026
    call_hooks(model_engine.model, "pre_reload_weights")
    kept = {}
    for name, parameter in model_engine.model.named_parameters():
        if _can_be_marked(parameter):
            kept[name] = _first(parameter).clone()
            _first(parameter).fill_(torch.nan)
    return Refit(kept)


@torch.inference_mode()
def check_loaded(model: Any, refit: Refit) -> int:
    """Number of marked parameters that were loaded. The others get their element back.

    Raises RuntimeError if none was loaded, or if one of a weight's own name was not: it would go on with the old
    weights. Parameters that the engine makes of others, or that no checkpoint holds, may stay as they are.
    """
    left = []
    parameters = dict(model.named_parameters())
    for name, before in refit.kept.items():
        parameter = parameters.get(name)
        if parameter is not None and _can_be_marked(parameter) and bool(_first(parameter).isnan()):
            _first(parameter).copy_(before)
            left.append(name)
    loaded = len(refit.kept) - len(left)
    missing = [name for name in left if name.replace("._orig_mod", "").removeprefix("_orig_mod.") in refit.sent]
    if missing or not loaded:
        named = missing or left
        raise RuntimeError(
            f"refit: {len(named)} of {len(refit.kept)} parameters kept their old weights, such as "
            f"{', '.join(named[:SHOWN])}: this TensorRT-LLM does not load them by name"
        )
    return loaded


def finalize_refit(worker: Any) -> None:
    """Let the engine derive what it derives from weights. ``worker``: has `engine`, the PyExecutor."""
    finalize = _upstream_finalize()
    if finalize is not None:
        finalize(worker)
        return
    model_engine = worker.engine.model_engine
    call_if_there(model_engine.model_loader, "finalize_update_weights")
    call_hooks(model_engine.model, "process_weights_after_loading")
    call_hooks(model_engine.model, "post_load_weights")


def call_if_there(owner: Any, name: str, *arguments: Any) -> None:
    """Call the method ``name`` of ``owner`` if it has one: of newer releases."""
    method = getattr(owner, name, None)
    if method is not None:
        method(*arguments)


def call_hooks(model: Any, name: str) -> None:
    """Call the method ``name`` of all modules of ``model`` that have it."""
    for module in model.modules():
        if hasattr(module, name) and not getattr(module, "_weights_removed", False):
            getattr(module, name)()


def _upstream_finalize() -> Callable[[Any], None] | None:
    """TensorRT-LLM's own way to finish a refit, which keeps CUDA graphs right; since July 2026, None before."""
    try:
        from tensorrt_llm.llmapi.rlhf_utils import WorkerExtension
    except ImportError:
        return None
    found: Callable[[Any], None] | None = getattr(WorkerExtension, "finalize_weight_update", None)
    return found


def _can_be_marked(parameter: Tensor) -> bool:
    return parameter.dtype in MARKED_TYPES and parameter.numel() > 0 and not parameter.is_meta


def _first(parameter: Tensor) -> Tensor:
    """A view of the first element."""
    return parameter.data[(0,) * parameter.dim()]
