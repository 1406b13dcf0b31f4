"""The two passes of `logprob_and_entropy` as Triton kernels, with the functions and numerics of `chunked`, on a GPU.

The forward reads each logit once and the backward reads and writes each once: both are bound by memory. Under
TRITON_INTERPRET=1, set before triton is imported, they run on the CPU, for tests.

Shapes: T tokens, v vocabulary columns of this tensor-parallel rank.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from echorl_nemo.ops.chunked import FLOOR, compute_dtype

BLOCK = 8192
"""Columns that one program processes at a time."""
WARPS = 8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, and so on the CPU."""

_FLOOR = tl.constexpr(FLOOR)


@triton.jit
def _partials_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations of its own
    logits,
    local,
    parts,
    width,
    row_stride,
    column_stride,
    scale: tl.constexpr,
    block: tl.constexpr,
    dtype: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * row_stride
    row_max = tl.full((), -float("inf"), dtype)
    total = tl.zeros((), dtype)
    weighted = tl.zeros((), dtype)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block).to(tl.int64)
        x = tl.load(start_of_row + columns * column_stride, mask=columns < width, other=-float("inf")).to(dtype)
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        # the sums so far are relative to the old maximum
        offset = tl.maximum((row_max - base) * scale, _FLOOR)
        shrink = tl.exp2(offset)
        y = tl.maximum((x - base) * scale, _FLOOR)
        power = tl.exp2(y)
        weighted = shrink * (weighted + offset * total) + tl.sum(power * y, axis=0)
        total = shrink * total + tl.sum(power, axis=0)
        row_max = new_max
    target = tl.load(local + row)
    here = (target >= 0) & (target < width)
    at_target = tl.load(start_of_row + target * column_stride, mask=here, other=-float("inf")).to(dtype)
    tl.store(parts + row * 4 + 0, row_max)
    tl.store(parts + row * 4 + 1, total)
    tl.store(parts + row * 4 + 2, weighted)
    tl.store(parts + row * 4 + 3, at_target)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    out, logits, local, row_max, constant, slope, at_target, width,
    out_row_stride, out_column_stride, row_stride, column_stride, scale: tl.constexpr,
    has_slope: tl.constexpr, block: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    mask = columns < width
    x = tl.load(logits + row * row_stride + columns * column_stride, mask=mask, other=-float("inf")).to(dtype)
    y = (x - tl.load(row_max + row)) * scale
    factor = tl.load(constant + row)
    if has_slope:
        factor += tl.load(slope + row) * tl.maximum(y, _FLOOR)
    grad = tl.exp2(y) * factor
    grad += tl.where(columns == tl.load(local + row), tl.load(at_target + row), 0.0)
    place = out + row * out_row_stride + columns * out_column_stride
    tl.store(place, grad.to(out.dtype.element_ty), mask=mask)


def partials(logits: Tensor, local: Tensor, scale: float) -> Tensor:
    """See `chunked.partials`."""
    parts = torch.empty(len(logits), 4, dtype=compute_dtype(logits), device=logits.device)
    if len(logits):
        _partials_kernel[(len(logits),)](
            logits, local, parts, logits.shape[1], *logits.stride(), scale,
            block=_block(logits), dtype=_dtype(parts), num_warps=WARPS,
        )  # fmt: skip
    return parts


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
    """See `chunked.write_gradient`."""
    if not len(logits):
        return
    block = _block(logits)
    _gradient_kernel[(len(logits), triton.cdiv(logits.shape[1], block))](
        out, logits, local, row_max, constant, constant if slope is None else slope, at_target, logits.shape[1],
        *out.stride(), *logits.stride(), scale,
        has_slope=slope is not None, block=block, dtype=_dtype(row_max), num_warps=WARPS,
    )  # fmt: skip


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.shape[1]))


def _dtype(values: Tensor) -> tl.dtype:
    return tl.float64 if values.dtype == torch.float64 else tl.float32
