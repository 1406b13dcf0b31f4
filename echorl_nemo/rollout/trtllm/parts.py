"""What goes to the engine and comes from it, piece by piece: weights in buckets, requests with their log-probs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """One finished request."""

    tokens: list[int]
    """Of the response."""
    logprobs: list[float] | None
    statistics: Tensor
    """[tokens, 2] nats: entropy and largest log-prob."""
    finished: bool
    top_logprobs: list[float] | None
    """Of a checked request: the engine's own largest log-probs."""


def token_logprobs(tokens: Sequence[int], given: Any) -> tuple[list[float] | None, list[float] | None]:
    """(the sampled tokens' log-probs, the largest ones), each None where they are not known.

    ``given``: a number for each token, or a dictionary by token id of the top-K (and, in newer versions, the sampled
    token).
    """
    if not given:
        return ([], None) if not tokens else (None, None)
    if isinstance(given[0], (int, float)):
        return [float(value) for value in given], None
    top = [max(float(entry.logprob) for entry in entries.values()) for entries in given]
    if any(token not in entries for token, entries in zip(tokens, given, strict=True)):
        return None, top
    return [float(entries[token].logprob) for token, entries in zip(tokens, given, strict=True)], top


def in_buckets(weights: Iterator[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in parts of about ``size`` bytes."""
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
