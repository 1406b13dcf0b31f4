"""Choosing the next token, the same one whatever the layout.

Shapes: A active rollouts, V vocabulary entries.
"""

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The next token of each rollout, [A] int64.

    ``logits`` [A, V]; ``uniforms`` [A] float64 in [0, 1). A token is found by inverting the cumulative distribution
    in float64 at its uniform, so that the uniform alone decides, not the row, the rank or a generator's state.
    ``temperature`` 0 takes the likeliest token.
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
    # rounding may put the threshold at the very end: take the last token that has any probability
    last = logits.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(found, last)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the ``k`` highest logits (and their ties)."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(probs: Tensor, p: float) -> Tensor:
    """0 for all but the smallest set of likeliest tokens whose probability reaches ``p``; not renormalised."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return probs.masked_fill((before >= p).gather(-1, order.argsort(dim=-1)), 0.0)


def rollout_uniforms(seed: int, group_id: int, member: int, count: int) -> Tensor:
    """``count`` uniforms in [0, 1), float64, of one rollout: fixed by the run's seed, its group and its place in it."""
    generator = torch.Generator().manual_seed(rollout_seed(seed, group_id, member))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def rollout_seed(seed: int, group_id: int, member: int) -> int:
    """A seed of 63 bits for one rollout."""
    state = 0
    for part in (seed, group_id, member):
        # odd multiplier and increment of a 64-bit linear congruential generator (Knuth, MMIX)
        state = ((state ^ part) * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    return state >> 1
