"""Log-prob and exact entropy of vocab-parallel logits, in one pass and one collective.

Shapes: T tokens (the leading dimensions flattened), v = V/TP vocabulary columns of this tensor-parallel rank.

Numerics: everything is taken on y = (x - m) / temperature, m the row's maximum, in float32. With S = sum e^y and
Q = sum e^y y, entropy = log S - Q/S; m and log S are kept apart, and m is taken off before the division, since a common
offset of the logits would cost the digits otherwise.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 1 << 20
"""Scratch of one chunk of rows, in the compute type."""


def logprob_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, in nats, of softmax(logits / temperature).

    ``logits`` [..., V/TP] of any float type, this rank's shard of the vocabulary (equal shards, in rank order);
    ``targets`` [...] int64 global ids; ``group`` the tensor-parallel ranks, None for the whole vocabulary. Logits of
    -inf are legal: such entries have probability 0. Both results are [...] float32 (float64 for float64 logits) and
    the same on every rank of ``group``.

    Gradients flow through the log-probs, and through the entropies if ``entropy_grad``. ``inplace_backward`` writes
    the gradient of ``logits`` into their own memory: legal only if nothing reads the logits after this call, and
    backward runs once.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    logprobs, entropies = _LogprobEntropy.apply(
        flat, targets.reshape(-1), group, temperature, entropy_grad, inplace_backward
    )
    return logprobs.view(targets.shape), entropies.view(targets.shape)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        temperature: float,
        entropy_grad: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        local = targets - _rank(group) * logits.shape[1]
        row_max, log_sum, entropy, target = _merge(_partials(logits, local, temperature), group, temperature)
        ctx.save_for_backward(logits, local, row_max, log_sum, entropy)
        ctx.temperature, ctx.entropy_grad, ctx.inplace_backward = temperature, entropy_grad, inplace_backward
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return (target - row_max) / temperature - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, row_max, log_sum, entropy = ctx.saved_tensors
        grad_logprob, grad_entropy = grads
        out = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        for rows in _chunks(logits, row_max.dtype):
            shifted = (logits[rows].to(row_max.dtype) - row_max[rows, None]).div_(ctx.temperature)
            shifted.sub_(log_sum[rows, None])  # log-softmax
            probs = shifted.exp()
            grad = probs * -grad_logprob[rows, None]
            if ctx.entropy_grad:
                surprise = shifted.masked_fill_(probs == 0, 0.0).add_(entropy[rows, None])
                grad.sub_(surprise.mul_(probs).mul_(grad_entropy[rows, None]))
            here = _on_shard(local[rows], logits.shape[1])
            index = local[rows].clamp(0, logits.shape[1] - 1)[:, None]
            grad.scatter_add_(1, index, torch.where(here, grad_logprob[rows], 0.0)[:, None])
            out[rows] = grad.div_(ctx.temperature).to(out.dtype)
        return out, None, None, None, None, None


def _partials(logits: Tensor, local: Tensor, temperature: float) -> Tensor:
    """[T, 4]: of this shard's columns the maximum m, S, Q and the target's logit (-inf if it lies elsewhere)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    parts = torch.empty(len(logits), 4, dtype=dtype, device=logits.device)
    for rows in _chunks(logits, dtype):
        wide = logits[rows].to(dtype)
        row_max = wide.max(dim=1).values
        here = _on_shard(local[rows], logits.shape[1])
        target = wide.gather(1, local[rows].clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        # a shard may be masked as a whole: its maximum is -inf, its sums are 0
        shifted = (wide - torch.where(row_max == -torch.inf, 0.0, row_max)[:, None]).div_(temperature)
        exp = shifted.exp()
        parts[rows, 0] = row_max
        parts[rows, 1] = exp.sum(dim=1)
        parts[rows, 2] = exp.mul_(shifted.masked_fill_(shifted == -torch.inf, 0.0)).sum(dim=1)
        parts[rows, 3] = torch.where(here, target, -torch.inf)
    return parts


def _merge(parts: Tensor, group: dist.ProcessGroup | None, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maximum, log S, entropy and target logit over the whole vocabulary, each [T]; one all-gather."""
    if group is not None and dist.get_world_size(group) > 1:
        gathered = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, parts, group=group)
        shards = torch.stack(gathered)  # [TP, T, 4]
    else:
        shards = parts[None]
    shard_max, shard_sum, shard_q, shard_target = shards.unbind(-1)
    row_max = shard_max.max(dim=0).values
    offset = (shard_max - row_max) / temperature
    scale = offset.exp()
    total = (scale * shard_sum).sum(dim=0)
    weighted = scale * (shard_q + offset.masked_fill(offset == -torch.inf, 0.0) * shard_sum)
    log_sum = total.log()
    return row_max, log_sum, log_sum - weighted.sum(dim=0) / total, shard_target.max(dim=0).values


def _chunks(logits: Tensor, dtype: torch.dtype) -> list[slice]:
    rows = max(1, CHUNK_BYTES // max(1, logits.shape[1] * dtype.itemsize))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _on_shard(local: Tensor, width: int) -> Tensor:
    return (local >= 0) & (local < width)


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if group is not None else 0
