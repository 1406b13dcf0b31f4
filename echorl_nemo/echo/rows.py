"""The rows that data-parallel ranks hold, as one batch.

Every rank keeps the token tensors of its own rows. Small columns, a value or a few for each rollout, are gathered.

Shapes: n rows of this rank, N of all ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Rows:
    """The rows of this rank among those of all. Every rank of the group must call each method."""

    def __init__(self, count: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """``count``: n. ``group``: the ranks that hold the other rows of the batch; None if there are none."""
        self.group = group
        self._counts = [count]
        first = 0
        if group is not None:
            counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(group.size())]
            dist.all_gather(counts, torch.tensor([count], device=device), group=group)
            self._counts = [int(each) for each in counts]
            first = sum(self._counts[: group.rank()])
        self.own = slice(first, first + count)
        """This rank's rows among the N; the ranks follow each other in the group's order."""

    def gather(self, column: Tensor, *, fill: float = 0) -> Tensor:
        """The rows of all ranks, [N] or [N, K], of a ``column`` [n] or [n, k]. K is the largest k of a rank, and
        ``fill`` stands where a rank has fewer."""
        if self.group is None:
            return column
        values = column.to(torch.uint8) if column.dtype == torch.bool else column
        shape = [max(self._counts)]
        if values.dim() == 2:
            width = torch.tensor([values.shape[1]], device=values.device)
            dist.all_reduce(width, op=dist.ReduceOp.MAX, group=self.group)
            shape.append(int(width))
        padded = torch.full(shape, fill, dtype=values.dtype, device=values.device)
        padded[tuple(slice(size) for size in values.shape)] = values
        gathered = [torch.empty_like(padded) for _ in self._counts]
        dist.all_gather(gathered, padded, group=self.group)
        joined = torch.cat([each[:count] for each, count in zip(gathered, self._counts, strict=True)])
        return joined.bool() if column.dtype == torch.bool else joined
