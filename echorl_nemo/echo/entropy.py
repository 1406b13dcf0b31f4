"""Step entropy: token entropies reduced over the steps of a response.

Shapes: N rollouts, S positions held by this rank, K steps of the response with the most.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class StepTable:
    """The steps of each response."""

    lengths: Tensor
    """[N, K] int64: tokens of each step; 0 where a rollout has no such step. K is at least 1."""
    entropies: Tensor
    """[N, K] float32, nats; -inf where a rollout has no such step."""


def step_table(
    entropies: Tensor, step_ids: Tensor, *, reduction: str = "mean", group: dist.ProcessGroup | None = None
) -> StepTable:
    """Length and entropy of each step, from one pass. Arguments as in `step_entropy`."""
    counts, values = _reduce(entropies, step_ids, reduction, group)
    if reduction == "mean":
        values = values / counts
    values = torch.where(counts > 0, values, -torch.inf).float()
    if not counts.shape[1]:  # no response token in the whole batch
        counts, values = counts.new_zeros(len(counts), 1), values.new_full((len(values), 1), -torch.inf)
    return StepTable(counts.long(), values)


def step_entropy(
    entropies: Tensor, step_ids: Tensor, *, reduction: str = "mean", group: dist.ProcessGroup | None = None
) -> Tensor:
    """Entropy of each step, [N, K] float32 in nats; -inf where a rollout has no such step.

    ``entropies`` [N, S] in nats and ``step_ids`` [N, S] (from `segment_steps`, -1 outside the response).
    ``group``: the context-parallel ranks that share a row; ``step_ids`` then count over the whole row. The ranks
    exchange one [N, K, 2] tensor, never the token tensors.
    """
    return step_table(entropies, step_ids, reduction=reduction, group=group).entropies


def _reduce(
    entropies: Tensor, step_ids: Tensor, reduction: str, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(token counts, reduced values), each [N, K] float64."""
    if reduction not in ("mean", "max", "sum"):
        raise ValueError(f"step_reduction={reduction!r} is not known; use one of mean, max, sum")
    n_steps = step_ids.max() + 1 if step_ids.numel() else torch.zeros((), dtype=torch.long, device=step_ids.device)
    if group is not None:
        dist.all_reduce(n_steps, op=dist.ReduceOp.MAX, group=group)
    # float64, so that the sum does not depend on where context-parallel ranks cut a step
    table = torch.zeros(len(step_ids), int(n_steps.item()) + 1, 2, dtype=torch.float64, device=step_ids.device)
    counts, values = table.unbind(-1)
    columns = step_ids + 1  # column 0 collects what lies outside the response
    counts.scatter_add_(1, columns, torch.ones_like(step_ids, dtype=torch.float64))
    if reduction == "max":
        values.fill_(-torch.inf)
        values.scatter_reduce_(1, columns, entropies.double(), "amax")
        if group is not None:
            counts = counts.contiguous()
            values = values.contiguous()
            dist.all_reduce(counts, group=group)
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    else:
        values.scatter_add_(1, columns, entropies.double())
        if group is not None:
            dist.all_reduce(table, group=group)
    return counts[:, 1:], values[:, 1:]
