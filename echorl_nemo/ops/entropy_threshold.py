"""The entropy from which a token counts as a fork: an exact quantile over the tokens of all ranks.

torch.quantile takes at most 2^24 values on one rank. Here each rank counts its values by the upper 16 bits of their
float32 representation, which is ordered like the values, and then by the lower 16 bits within the one bin that holds
the quantile. Ranks exchange two histograms of 0.5 MB and never the entropies. The result has no error: it is one of the
values.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ROWS_AT_ONCE = 64
"""Rows whose entropies are counted at a time, so that little memory is needed beside the batch."""


def entropy_threshold(
    entropies: Tensor, inside: Tensor, share: float, *, groups: Sequence[dist.ProcessGroup] = ()
) -> float | None:
    """The entropy, nats, that a token must have to be among the ``share`` of tokens with the highest.

    It is `torch.quantile(values, 1 - share, interpolation="higher")` over the tokens of ``inside`` [n, S] bool in
    ``entropies`` [n, S] nats, and over those of the other ranks of ``groups``; None if there is no token. Entropies
    below 0, which rounding makes, count as 0. Raises ValueError if an entropy inside is not finite.
    """
    upper = torch.zeros(1 << 16, dtype=torch.long, device=entropies.device)
    for bits in _bits(entropies, inside):
        upper += torch.bincount(bits >> 16, minlength=1 << 16)
    _sum(upper, groups)
    count = int(upper.sum())
    if not count:
        return None
    # the index of the quantile among the sorted values; the product's rounding must not raise it
    index = min(count - 1, max(0, _ceil((1 - share) * (count - 1))))
    below = upper.cumsum(0)
    high = int(torch.searchsorted(below, index, right=True))
    index -= int(below[high - 1]) if high else 0
    lower = torch.zeros(1 << 16, dtype=torch.long, device=entropies.device)
    for bits in _bits(entropies, inside):
        lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    _sum(lower, groups)
    low = int(torch.searchsorted(lower.cumsum(0), index, right=True))
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))


def running_threshold(mean: float | None, threshold: float | None, decay: float) -> float | None:
    """The exponential mean of the thresholds of the steps so far: ``decay`` x ``mean`` + (1 - ``decay``) x
    ``threshold``. The first threshold is the mean; a step without one, None, changes nothing."""
    if mean is None or threshold is None:
        return threshold if mean is None else mean
    return decay * mean + (1 - decay) * threshold


def _bits(entropies: Tensor, inside: Tensor) -> Iterator[Tensor]:
    """The bits of the float32 entropies inside, as int32, by blocks of rows."""
    for first in range(0, len(entropies), ROWS_AT_ONCE):
        block = slice(first, first + ROWS_AT_ONCE)
        values = entropies[block][inside[block]].float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("the entropies are not all finite: a threshold cannot be counted; look at the weights")
        yield (values.clamp(min=0) + 0.0).view(torch.int32)  # + 0.0 makes -0.0 positive, so that no sign bit is set


def _ceil(value: float) -> int:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1.0, abs(value)) else int(value) + 1


def _sum(counts: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    for group in groups:
        dist.all_reduce(counts, group=group)
