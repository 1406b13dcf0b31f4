"""Tensor operations that the method needs in every host. Imports torch alone."""

from echorl_nemo.ops.logprob_entropy import entropy_and_max_logprob, logprob_and_entropy

__all__ = ["entropy_and_max_logprob", "logprob_and_entropy"]
