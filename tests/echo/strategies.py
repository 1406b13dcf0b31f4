"""Random batches of rollouts for property tests: boundaries anywhere, ties, truncation, empty responses."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

BOUNDARIES = (1, 2)
"""Of the vocabulary 0..5."""


@dataclass
class Batch:
    tokens: Tensor
    response_mask: Tensor
    entropies: Tensor
    rewards: Tensor
    finished: Tensor
    group_ids: Tensor


@st.composite
def batches(draw: st.DrawFn, max_rollouts: int = 6, width: int = 10) -> Batch:
    count = draw(st.integers(1, max_rollouts))
    tokens, masks, entropies = [], [], []
    for _ in range(count):
        start = draw(st.integers(0, width))
        end = draw(st.integers(start, width))
        masks.append([start <= i < end for i in range(width)])
        tokens.append(draw(st.lists(st.integers(0, 5), min_size=width, max_size=width)))
        # quarters make ties frequent and sums exact
        raw = draw(st.lists(st.integers(0, 6), min_size=width, max_size=width))
        entropies.append([value / 4 if inside else 0.0 for value, inside in zip(raw, masks[-1], strict=True)])
    return Batch(
        tokens=torch.tensor(tokens),
        response_mask=torch.tensor(masks),
        entropies=torch.tensor(entropies),
        rewards=torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=count, max_size=count))),
        finished=torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        group_ids=torch.tensor(draw(st.lists(st.integers(7, 9), min_size=count, max_size=count))),
    )
