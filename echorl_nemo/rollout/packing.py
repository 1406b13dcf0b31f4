"""Packed rows: rollouts of different lengths one after the other in one row, without padding between them.

Shapes: B rollouts of a micro-batch, S positions, W tokens of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """The tokens of some rollouts as one row; what is left of the row is a sequence of its own."""

    tokens: Tensor
    """[1, W] int64."""
    positions: Tensor
    """[1, W] int64: of each token in its rollout."""
    cu_seqlens: Tensor
    """[B + 1] int32, or [B + 2] with what is left: where each sequence starts, and the end of the last."""
    longest: int
    """Tokens of the longest sequence."""
    place: Tensor
    """[tokens of the rollouts] int64: where each stands in the rollouts' own rows, flattened."""
    shape: tuple[int, int]
    """(B, S)."""

    def unpack(self, values: Tensor) -> Tensor:
        """``values`` [1, W] of the row's tokens, in the rollouts' own rows: [B, S], 0 in the padding."""
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.scatter(0, self.place, values[0, : len(self.place)]).view(self.shape)

    def pack(self, values: Tensor) -> Tensor:
        """The reverse: ``values`` [B, S] along the row, [1, W]; 0 in what is left."""
        packed = values.flatten()[self.place]
        return torch.nn.functional.pad(packed, (0, self.tokens.shape[1] - len(packed)))[None]


def pack_row(tokens: Tensor, lengths: Sequence[int], width: int) -> PackedRow:
    """One row of ``width`` tokens of ``tokens`` [B, S], of which the first ``lengths`` of each count.

    Raises ValueError if they do not fit.
    """
    sizes, used = list(lengths), sum(lengths)
    if used > width:
        raise ValueError(f"{used} tokens do not fit a packed row of {width}")
    sizes += [width - used] if width > used else []
    # indices are made on the host, where the lengths are: the device is not waited for
    columns = [torch.arange(size) for size in sizes]
    starts = range(0, tokens.numel(), tokens.shape[1])
    row = PackedRow(
        tokens=tokens.new_zeros(1, width),
        positions=torch.cat(columns)[None].to(tokens.device, non_blocking=True),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0).int().to(tokens.device, non_blocking=True),
        longest=max(sizes),
        place=torch.cat([start + own for start, own in zip(starts, columns, strict=False)]).to(
            tokens.device, non_blocking=True
        ),
        shape=(tokens.shape[0], tokens.shape[1]),
    )
    row.tokens.copy_(row.pack(tokens))
    return row


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of ``lengths`` in as few rows of ``capacity`` tokens as first-fit decreasing finds.

    Raises ValueError for a length above ``capacity``.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > capacity:
            raise ValueError(f"a rollout of {lengths[index]} tokens does not fit a packed row of {capacity}")
        place = next((i for i, room in enumerate(free) if room >= lengths[index]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(capacity)
        rows[place].append(index)
        free[place] -= lengths[index]
    return rows
