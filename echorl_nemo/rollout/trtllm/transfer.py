"""Data that is exchanged with TensorRT-LLM: finished requests with their log-probs, and weights in buckets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """One finished request."""

    tokens: list[int]
    """Token ids of the response."""
    logprobs: list[float] | None
    """Log-probs of the tokens, nats; None if the engine did not return them."""
    statistics: Tensor
    """[tokens, 2] nats: entropy and largest log-prob of each token, from the probe."""
    finished: bool
    top_logprobs: list[float] | None
    """The engine's own largest log-probs, nats, for a request that is checked."""


def token_logprobs(tokens: Sequence[int], given: Any) -> tuple[list[float] | None, list[float] | None]:
    """(log-probs of the sampled tokens, largest log-probs), each None if it is not known.

    ``given``: what the engine returned, a number for each token, or a dictionary by token id of the top-K (in newer
    versions the sampled token is among them).
    """
    if not given:
        return ([], None) if not tokens else (None, None)
    if isinstance(given[0], (int, float)):
        return [float(value) for value in given], None
    top = [max(float(entry.logprob) for entry in entries.values()) for entries in given]
    if any(token not in entries for token, entries in zip(tokens, given, strict=True)):
        return None, top
    return [float(entries[token].logprob) for token, entries in zip(tokens, given, strict=True)], top


def weight_buckets(weights: Iterator[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group the weights, in order, into lists of at most ``size`` bytes; a larger weight has a list of its own."""
    bucket: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in weights:
        if bucket and used + tensor.nbytes > size:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += tensor.nbytes
    if bucket:
        yield bucket
