"""Tensor operations that the method needs in every host. Imports torch alone."""

from echorl_nemo.ops.logprob_entropy import logprob_and_entropy

__all__ = ["logprob_and_entropy"]
