"""Limits the names that the pickles of a checkpoint may import while it is read.

A pickle can name any function, and reading it calls the function. torch and Megatron read several pickles of a
checkpoint without a limit, so that an audit hook (`sys.addaudithook`) checks every name that a pickle looks up.
"""

import builtins
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from echorl_nemo.errors import UserError

MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.mapping",
    "echorl_nemo.errors",
)
"""Modules in which every class is harmless."""
NAMES = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),  # torch.load(weights_only=True)
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.distributed.checkpoint.api", "CheckpointException"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.storage", "UntypedStorage"),
    ("traceback", "FrameSummary"),
    ("traceback", "StackSummary"),
}
_reading: list[Path] = []
_watching: list[bool] = []
_refused: list[str] = []


@contextmanager
def checkpoint_classes_only(checkpoint: Path) -> Iterator[None]:
    """While ``checkpoint`` is read, refuse pickles that name anything that no checkpoint holds. Raises UserError for
    such a name, even if the reading library raises another error."""
    if not _watching:
        sys.addaudithook(_refuse_other_names)  # a hook cannot be removed again
        _watching.append(True)
    _reading.append(checkpoint)
    _refused.clear()
    try:
        yield
    except Exception as error:  # the reading library may wrap the refusal in an error of any kind
        if _refused:
            raise UserError(_refused[0]) from error
        raise
    finally:
        _reading.pop()


def _refuse_other_names(event: str, arguments: tuple[object, ...]) -> None:
    if event != "pickle.find_class" or not _reading:
        return
    module, name = str(arguments[0]), str(arguments[1])
    if not _is_harmless(module, name):
        _refused.append(
            f"{_reading[-1]}: a pickle in it names {module}.{name}, which no checkpoint of this program holds, and "
            "which reading it would call; restore the checkpoint from a copy that you trust"
        )
        raise UserError(_refused[-1])


def _is_harmless(module: str, name: str) -> bool:
    if "." in name:  # a dotted name could reach everything that the module imports
        return False
    if (module, name) in NAMES:
        return True
    if module in MODULES:
        value = getattr(importlib.import_module(module), name, None)
        return isinstance(value, type) and value.__module__ == module
    if module == "torch":
        value = getattr(torch, name, None)
        storage = isinstance(value, type) and name.endswith("Storage")
        return isinstance(value, torch.dtype) or storage
    if module == "builtins":
        value = getattr(builtins, name, None)
        return name in ("set", "frozenset", "complex", "bytearray", "slice", "range") or (
            isinstance(value, type) and issubclass(value, BaseException)
        )
    return False
