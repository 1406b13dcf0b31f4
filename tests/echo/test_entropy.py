from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echorl_nemo.echo import segment_steps, step_entropy
from tests import reference
from tests.echo.strategies import BOUNDARIES, Batch, batches


@given(batches(), st.sampled_from(["mean", "max", "sum"]))
def test_step_entropies_equal_the_reference(batch: Batch, reduction: str) -> None:
    steps = segment_steps(batch.tokens, batch.response_mask, BOUNDARIES)
    result = step_entropy(batch.entropies, steps, reduction=reduction)
    for row in range(len(steps)):
        expected = reference.entropies_of_steps(batch.entropies[row].tolist(), steps[row].tolist(), reduction)
        padding = [float("-inf")] * (result.shape[1] - len(expected))
        assert result[row].tolist() == pytest.approx(expected + padding, rel=1e-6)


def _split_over_ranks(entropies: Tensor, steps: Tensor, reduction: str) -> list[Any]:
    """Each rank holds its chunk of every row and the step ids of the whole row."""
    rank, world = dist.get_rank(), dist.get_world_size()
    part = step_entropy(
        entropies.chunk(world, dim=1)[rank],
        steps.chunk(world, dim=1)[rank],
        reduction=reduction,
        group=dist.group.WORLD,
    )
    return part.tolist()


@pytest.mark.parametrize("reduction", ["mean", "max", "sum"])
def test_rows_split_over_ranks_give_the_unsplit_answer(ranks: Callable[..., list[Any]], reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (5, 16), generator=generator)
    response = torch.arange(16).expand(5, -1) >= torch.tensor([[0], [3], [8], [15], [16]])
    entropies = torch.rand(5, 16, generator=generator) * response
    steps = segment_steps(tokens, response, BOUNDARIES)
    whole = step_entropy(entropies, steps, reduction=reduction).tolist()
    for part in ranks(2, _split_over_ranks, entropies, steps, reduction):
        assert part == whole


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="step_reduction='median' is not known"):
        step_entropy(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), reduction="median")
