"""The two passes of `logprob_and_entropy` over the logits in plain torch, chunk by chunk: any device, no copy of them.

Shapes: T tokens, v vocabulary columns of this tensor-parallel rank. ``local`` [T] int64 are target ids counted from
this shard's first column; ``scale`` is log2(e) / temperature, so that with y = (x - m) * scale a probability is
2^y / S. Powers of 2 rather than of e: torch's exp() is three times slower on the CPU, 30 times where it underflows.
"""

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 1 << 20
"""Size of one of the two scratch buffers on the CPU, bytes: it fits a core's cache."""
DEVICE_CHUNK_BYTES = 64 << 20
"""Size of one of the two scratch buffers on other devices, bytes: there, launches cost more than memory."""
FLOOR = -1.0e4
"""Lower bound of the exponent y. 2^FLOOR and FLOOR x 2^FLOOR are exactly 0, so that -inf logits give no NaN."""


def partials(logits: Tensor, local: Tensor, scale: float) -> Tensor:
    """[T, 4] over this shard's columns: the maximum m, sum 2^y, sum 2^y y, the target's logit (-inf on other shards).

    ``logits`` [T, v]; the result is float32, float64 for float64 logits.
    """
    dtype = compute_dtype(logits)
    parts = torch.empty(len(logits), 4, dtype=dtype, device=logits.device)
    shifted, power = _scratch(logits, dtype)
    for rows in _chunks(logits, dtype):
        x = logits[rows]
        y, exp = shifted[: len(x)], power[: len(x)]
        y.copy_(x)
        row_max = y.amax(dim=1, keepdim=True)
        here = (local[rows] >= 0) & (local[rows] < x.shape[1])
        target = y.gather(1, local[rows].clamp(0, x.shape[1] - 1)[:, None])[:, 0]
        # a shard may be masked as a whole: its maximum is -inf, its sums are 0
        y.sub_(torch.where(row_max == -torch.inf, 0.0, row_max)).mul_(scale).clamp_(min=FLOOR)
        torch.exp2(y, out=exp)
        parts[rows, 0] = row_max[:, 0]
        parts[rows, 1] = exp.sum(dim=1)
        parts[rows, 2] = weighted_sums(exp, y)
        parts[rows, 3] = torch.where(here, target, -torch.inf)
    return parts


def weighted_sums(power: Tensor, y: Tensor) -> Tensor:
    """sum 2^y y of each row, which only the entropy needs. Overwrites ``y``."""
    return y.mul_(power).sum(dim=1)


def write_gradient(
    out: Tensor,
    logits: Tensor,
    local: Tensor,
    row_max: Tensor,
    scale: float,
    constant: Tensor,
    slope: Tensor | None,
    at_target: Tensor,
) -> None:
    """Write 2^y (constant + slope y), plus ``at_target`` in the target's column, to ``out`` [T, v].

    ``out`` may be ``logits`` themselves; ``row_max`` (of the whole vocabulary), ``constant``, ``slope`` (None is 0)
    and ``at_target`` are [T] in the compute type.
    """
    shifted, power = _scratch(logits, row_max.dtype)
    for rows in _chunks(logits, row_max.dtype):
        x = logits[rows]
        y, grad = shifted[: len(x)], power[: len(x)]
        torch.sub(x, row_max[rows, None], out=y)
        torch.exp2(y.mul_(scale), out=grad)
        if slope is None:
            grad.mul_(constant[rows, None])
        else:
            grad.mul_(y.clamp_(min=FLOOR).mul_(slope[rows, None]).add_(constant[rows, None]))
        here = (local[rows] >= 0) & (local[rows] < x.shape[1])
        index = local[rows].clamp(0, x.shape[1] - 1)[:, None]
        grad.scatter_add_(1, index, torch.where(here, at_target[rows], 0.0)[:, None])
        out[rows] = grad


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The type to compute in: float32, and float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scratch(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = min(len(logits), _rows_of_a_chunk(logits, dtype))
    shape = (2, rows, logits.shape[1])
    first, second = torch.empty(shape, dtype=dtype, device=logits.device)
    return first, second


def _chunks(logits: Tensor, dtype: torch.dtype) -> list[slice]:
    rows = _rows_of_a_chunk(logits, dtype)
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _rows_of_a_chunk(logits: Tensor, dtype: torch.dtype) -> int:
    size = CPU_CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, size // max(1, logits.shape[1] * dtype.itemsize))
