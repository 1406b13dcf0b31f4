"""Samples the next token so that the choice does not depend on the parallel layout.

Shapes: A active rollouts, V vocabulary entries.
"""

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The next token of each rollout, [A] int64.

    ``logits`` [A, V]; ``uniforms`` [A] float64 in [0, 1). The cumulative distribution is inverted at the uniform in
    float64, so that only the uniform decides, not the row, the rank or a generator's state. ``temperature`` 0 takes the
    likeliest token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double() / temperature
    if top_k:
        scaled = keep_top_k(scaled, top_k)
    probs = scaled.softmax(dim=-1)
    if top_p < 1:
        probs = keep_top_p(probs, top_p)
    cumulative = probs.cumsum(dim=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # rounding may put the threshold at the very end: then take the last token with a probability
    last = logits.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(found, last)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """``logits`` with -inf for all but the ``k`` highest (and their ties)."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """``probs`` with 0 for all but the smallest set of likeliest tokens whose sum reaches ``p``; not renormalised."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return probs.masked_fill((before >= p).gather(-1, order.argsort(dim=-1)), 0.0)


def rollout_uniforms(seed: int, group_id: int, member: int, count: int) -> Tensor:
    """``count`` random numbers in [0, 1), float64, for one rollout. The run's seed, the group and the rollout's number
    in it, ``member``, determine them."""
    generator = torch.Generator().manual_seed(rollout_seed(seed, group_id, member))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def rollout_seed(seed: int, group_id: int, member: int) -> int:
    """The seed of one rollout, 63 bits, from the run's seed, the group and the rollout's number in it."""
    state = 0
    for part in (seed, group_id, member):
        # odd multiplier and increment of a 64-bit linear congruential generator (Knuth, MMIX)
        state = ((state ^ part) * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    return state >> 1
