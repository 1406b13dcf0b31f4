from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echorl_nemo.echo import ClipSelection, EchoRLConfig, segment_steps, select_clips, step_entropy
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


def zigzag(values: Tensor, rank: int, world: int) -> Tensor:
    """The columns of a context-parallel rank in Megatron's order: of 2 x world chunks, number rank from either end."""
    chunks = values.chunk(2 * world, dim=1)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim=1)


def rows_for_ranks() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, response mask and entropies of 5 rows that 2 and 4 ranks can share: a response from the first token on,
    some, one token, none."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (5, 32), generator=generator)
    response = torch.arange(32).expand(5, -1) >= torch.tensor([[0], [5], [17], [31], [32]])
    return tokens, response, torch.rand(5, 32, generator=generator) * response


def _split_over_ranks(
    entropies: Tensor, steps: Tensor, rewards: Tensor, config: EchoRLConfig
) -> tuple[Tensor, ClipSelection, int]:
    """On a rank that holds its part of every row, and the step ids of the whole row: step entropies, clips, and the
    most elements that travelled at once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = [0]
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] = max(sent[0], tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    entropies, steps = zigzag(entropies, rank, world), zigzag(steps, rank, world)
    heights = step_entropy(entropies, steps, reduction=config.step_reduction, group=dist.group.WORLD)
    selection = select_clips(
        entropies,
        steps,
        rewards=rewards,
        finished=torch.ones(len(rewards), dtype=torch.bool),
        group_ids=torch.zeros(len(rewards), dtype=torch.long),
        config=config,
        group=dist.group.WORLD,
    )
    return heights, selection, sent[0]


@pytest.mark.parametrize("span", ["prefix", "random_prefix", "shuffled_prefix"])
@pytest.mark.parametrize("reduction", ["mean", "max", "sum"])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_split_over_context_parallel_ranks_give_the_unsplit_answer(
    ranks: Callable[..., list[Any]], world: int, reduction: str, span: str
) -> None:
    tokens, response, entropies = rows_for_ranks()
    steps = segment_steps(tokens, response, BOUNDARIES)
    config = EchoRLConfig(step_reduction=reduction, span=span, per_group="all")
    rewards = torch.ones(len(tokens))
    whole = step_entropy(entropies, steps, reduction=reduction)
    clips = select_clips(
        entropies,
        steps,
        rewards=rewards,
        finished=torch.ones(len(rewards), dtype=torch.bool),
        group_ids=torch.zeros(len(rewards), dtype=torch.long),
        config=config,
    )
    assert clips.stats["clips"] == 4 and 0 < clips.stats["clip_share"] < 1
    for rank, (heights, selection, sent) in enumerate(
        ranks(world, _split_over_ranks, entropies, steps, rewards, config)
    ):
        assert torch.equal(heights, whole)
        assert torch.equal(selection.weight, zigzag(clips.weight, rank, world))
        assert torch.equal(selection.peak_step, clips.peak_step)
        assert selection.stats == clips.stats
        assert sent <= 2 * len(tokens) * (whole.shape[1] + 1)  # sums and counts of the steps, never the tokens


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="step_reduction='median' is not known"):
        step_entropy(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), reduction="median")
