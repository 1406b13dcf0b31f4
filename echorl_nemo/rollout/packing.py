"""Packed rows: rollouts of different lengths are concatenated in one row, without padding between them.

Shapes: B rollouts of a micro-batch, S positions, W tokens of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """The tokens of some rollouts as one row. The unused end of the row counts as one more sequence."""

    tokens: Tensor
    """[1, W] int64."""
    positions: Tensor
    """[1, W] int64: position of each token in its rollout."""
    cu_seqlens: Tensor
    """[B + 1] int32, or [B + 2] with an unused end: the start of each sequence, and the end of the last."""
    sizes: list[int]
    """Number of tokens of each sequence."""
    place: Tensor
    """[tokens of the rollouts] int64: index of each token in the flattened [B, S] rows of the rollouts."""
    shape: tuple[int, int]
    """(B, S), the shape of the rollouts' own rows."""

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(self.sizes)

    def unpack(self, values: Tensor) -> Tensor:
        """``values`` [1, W] of the packed row moved to the rollouts' own rows, [B, S], with 0 in the padding."""
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.scatter(0, self.place, values[0, : len(self.place)]).view(self.shape)

    def pack(self, values: Tensor) -> Tensor:
        """``values`` [B, S] of the rollouts' own rows moved to the packed row, [1, W], with 0 in its unused end."""
        packed = values.flatten()[self.place]
        return torch.nn.functional.pad(packed, (0, self.tokens.shape[1] - len(packed)))[None]


def pack_row(tokens: Tensor, lengths: Sequence[int], width: int) -> PackedRow:
    """Pack the rows of ``tokens`` [B, S], each with its first ``lengths`` tokens, into one row of ``width`` tokens.

    Raises ValueError if they do not fit.
    """
    sizes, used = list(lengths), sum(lengths)
    if used > width:
        raise ValueError(f"{used} tokens do not fit a packed row of {width}")
    sizes += [width - used] if width > used else []
    # the indices are made on the host, where the lengths are, so that there is no wait for the device
    columns = [torch.arange(size) for size in sizes]
    starts = range(0, tokens.numel(), tokens.shape[1])
    row = PackedRow(
        tokens=tokens.new_zeros(1, width),
        positions=torch.cat(columns)[None].to(tokens.device, non_blocking=True),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0).int().to(tokens.device, non_blocking=True),
        sizes=sizes,
        place=torch.cat([start + own for start, own in zip(starts, columns, strict=False)]).to(
            tokens.device, non_blocking=True
        ),
        shape=(tokens.shape[0], tokens.shape[1]),
    )
    row.tokens.copy_(row.pack(tokens))
    return row


def pack_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute rollouts with ``lengths`` over rows of ``capacity`` tokens, by first-fit decreasing. Returns the
    indices of the rollouts in each row.

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
