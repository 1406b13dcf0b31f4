"""Log-prob and exact entropy of vocab-parallel logits, in one pass over them and one collective.

Shapes: T tokens (the leading dimensions flattened), v = V/TP vocabulary columns of this tensor-parallel rank.

Numerics: everything is computed from y = (x - m) log2(e) / temperature, where m is the row's maximum, in float32. With
S = sum 2^y and Q = ln 2 sum 2^y y, entropy = log S - Q/S. m and log S are kept separately, and m is subtracted before
the division, since a common offset of the logits would cost digits otherwise. The backward pass keeps the logits and
three numbers a token, and computes the softmax again.
"""

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.ops import chunked
from echorl_nemo.ops.chunked import compute_dtype

BACKENDS = ("auto", "chunked", "triton")
BACKEND_VARIABLE = "ECHORL_OP_BACKEND"
"""Environment variable that stands in for ``backend="auto"``."""


def logprob_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The log-prob of each target and the entropy of each distribution softmax(logits / temperature), in nats.

    ``logits`` [..., V/TP] of any float type, this rank's shard of the vocabulary (equal shards, in rank order);
    ``targets`` [...] int64 global ids; ``group`` the tensor-parallel ranks, None for the whole vocabulary. Logits of
    -inf are legal: such entries have probability 0. ``vocab_size``: entries of the vocabulary where the logits are
    padded beyond it; whatever the padding holds, its probability and its gradient are 0. Both results are [...]
    float32 (float64 for float64 logits) and the same on every rank of ``group``.

    Gradients flow through the log-probs, and through the entropies if ``entropy_grad``. ``inplace_backward`` writes
    the gradient of ``logits`` into their own memory: legal only if nothing reads the logits after this call (no other
    loss, no metric, no layer that saved them for its own backward, as a softmax or a tanh cap would), and backward
    runs once.

    ``backend``: `triton` (CUDA), `chunked` (torch, any device), or `auto`: what the environment variable
    ECHORL_OP_BACKEND names, else `triton` for CUDA tensors and `chunked` for others. The numerics are the same.
    Raises ValueError for an unknown backend, or `triton` without a GPU; ImportError where triton is missing.
    """
    passes, width = _passes(backend, logits.device), logits.shape[-1]
    columns = width if vocab_size is None else min(max(vocab_size - _rank(group) * width, 0), width)
    logprobs, entropies = _LogprobEntropy.apply(
        logits.reshape(-1, width),
        targets.reshape(-1),
        group,
        temperature,
        columns,
        entropy_grad,
        inplace_backward,
        passes,
    )
    return logprobs.view(targets.shape), entropies.view(targets.shape)


def entropy_and_max_logprob(
    logits: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None, backend: str = "auto"
) -> Tensor:
    """[T, 2] float32 nats: the entropy of softmax(logits / temperature), and the log-prob of its likeliest entry.

    ``logits`` [T, V] over the whole vocabulary, ``vocab_size`` and ``backend`` as in `logprob_and_entropy`. One pass,
    no gradient: for a rollout engine, which has the logits that it samples from.
    """
    scale = math.log2(math.e) / temperature
    nowhere = torch.full((len(logits),), -1, dtype=torch.long, device=logits.device)
    parts = _passes(backend, logits.device).partials(logits[:, :vocab_size], nowhere, scale)
    _, log_sum, entropy, _ = _merge(parts, None, scale)
    return torch.stack([entropy, -log_sum], dim=1)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        temperature: float,
        columns: int,
        entropy_grad: bool,
        inplace_backward: bool,
        passes: Any,
    ) -> tuple[Tensor, Tensor]:
        scale = math.log2(math.e) / temperature
        local = targets - _rank(group) * logits.shape[1]
        parts = passes.partials(logits[:, :columns], local, scale) if columns else _nothing(logits)
        row_max, log_sum, entropy, target = _merge(parts, group, scale)
        ctx.save_for_backward(logits, local, row_max, log_sum, entropy)
        ctx.temperature, ctx.scale, ctx.columns, ctx.passes = temperature, scale, columns, passes
        ctx.entropy_grad, ctx.inplace_backward = entropy_grad, inplace_backward
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return (target - row_max) / temperature - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With p = 2^y / S: d logprob / dx = (1 at the target - p) / temperature, and
        d entropy / dx = -p (log p + entropy) / temperature, where log p = y ln 2 - log S."""
        logits, local, row_max, log_sum, entropy = ctx.saved_tensors
        grad_logprob, grad_entropy = grads
        per_power = (-log_sum).exp() / ctx.temperature  # 2^y times this is p / temperature
        constant, slope = -grad_logprob * per_power, None
        if ctx.entropy_grad:
            constant = constant - grad_entropy * (entropy - log_sum) * per_power
            slope = grad_entropy * per_power * -math.log(2)
        out = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        at_target = grad_logprob / ctx.temperature
        real = slice(0, ctx.columns)
        if ctx.columns:
            ctx.passes.write_gradient(
                out[:, real], logits[:, real], local, row_max, ctx.scale, constant, slope, at_target
            )
        out[:, ctx.columns :] = 0.0
        return out, None, None, None, None, None, None, None


def _nothing(logits: Tensor) -> Tensor:
    """The partials of a shard that holds only padding."""
    parts = torch.zeros(len(logits), 4, dtype=compute_dtype(logits), device=logits.device)
    parts[:, 0] = parts[:, 3] = -torch.inf
    return parts


def _merge(parts: Tensor, group: dist.ProcessGroup | None, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maximum, log S, entropy and target logit over the whole vocabulary, each [T]; one all-gather."""
    shards = parts[None]
    if group is not None and (world := dist.get_world_size(group)) > 1:
        gathered = parts.new_empty(world * len(parts), 4)
        # torch before 2.13 has only the second name
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, parts, group=group)
        shards = gathered.view(world, len(parts), 4)
    shard_max, shard_sum, shard_weighted, shard_target = shards.unbind(-1)
    row_max = shard_max.amax(dim=0)
    offset = (shard_max - row_max) * scale
    power = offset.exp2()
    total = (power * shard_sum).sum(dim=0)
    weighted = power * (shard_weighted + offset.masked_fill(offset == -torch.inf, 0.0) * shard_sum)
    log_sum = total.log()
    entropy = log_sum - math.log(2) * weighted.sum(dim=0) / total
    return row_max, log_sum, entropy, shard_target.amax(dim=0)


def _passes(backend: str, device: torch.device) -> Any:
    """The module that implements the two passes over the logits for ``backend``."""
    if backend == "auto":
        backend = os.environ.get(BACKEND_VARIABLE, "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} (or {BACKEND_VARIABLE}) is not known; use one of {', '.join(BACKENDS)}")
    if backend == "chunked" or (backend == "auto" and device.type != "cuda"):
        return chunked
    from echorl_nemo.ops import triton_kernels  # triton is needed only here

    if device.type != "cuda" and not triton_kernels.INTERPRETED:
        raise ValueError(f"backend='triton': the logits are on {device}, the kernels need CUDA; use 'chunked'")
    return triton_kernels


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if group is not None else 0
