"""Tensor operations that the method needs in every host, and the ranges of settings. torch is the only dependency.

The operations are imported at their first use, so that reading a configuration does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echorl_nemo.ops.logprob_entropy import entropy_and_max_logprob, logprob_and_entropy

__all__ = ["entropy_and_max_logprob", "logprob_and_entropy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from echorl_nemo.ops import logprob_entropy

    return getattr(logprob_entropy, name)
