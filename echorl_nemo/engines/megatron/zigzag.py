"""The order in which context-parallel ranks share the positions of a sequence.

A sequence is cut into 2C chunks of one length, and rank r of C holds the chunks r and 2C - 1 - r (zigzag): so every
rank attends to the same number of tokens. Transformer Engine's attention and Megatron-Core's position embeddings expect
this order (rope_utils.py, get_pos_emb_on_this_cp_rank).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def held_positions(sizes: Sequence[int], size: int, rank: int) -> Tensor:
    """[sum of ``sizes`` / size] int64: the positions that rank ``rank`` of ``size`` context-parallel ranks holds of a
    row of sequences with ``sizes`` tokens, each a multiple of 2 x ``size``."""
    held, start = [], 0
    for tokens in sizes:
        chunk = tokens // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            held.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += tokens
    return torch.cat(held)


def natural_order(sizes: Sequence[int], size: int) -> Tensor:
    """[sum of ``sizes``] int64: for each position of the row its place among the positions of all ranks, one rank after
    the other."""
    return torch.cat([held_positions(sizes, size, rank) for rank in range(size)]).argsort()


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not less than ``count``."""
    return count + -count % multiple
