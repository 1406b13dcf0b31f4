"""Checks of what a function that a configuration names returns."""

from collections.abc import Sequence

from torch import Tensor


def tensor_of_shape(value: object, shape: Sequence[int], source: str) -> Tensor:
    """``value``, which ``source``, `key=package.module:function`, returned. Raises ValueError if it is not a tensor of
    ``shape``."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{source} returned {type(value).__name__}; return a torch tensor of shape {list(shape)}")
    if value.shape != tuple(shape):
        raise ValueError(f"{source} returned shape {list(value.shape)}; return a tensor of shape {list(shape)}")
    return value
