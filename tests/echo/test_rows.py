"""Rows that data-parallel ranks hold select the same clips as one rank that holds them all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from echorl_nemo.echo import ClipSelection, EchoRLConfig, count_steps_before, segment_steps, select_clips
from echorl_nemo.echo.config import SPANS
from tests.echo.strategies import BOUNDARIES

PARTS = {2: [5, 13], 3: [3, 15, 0]}
"""Rows of each rank; a group may be split, and a rank may have none."""
COUNT = 18


def example() -> dict[str, torch.Tensor]:
    """18 rollouts of 6 groups, the longest responses on the last rank."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 6, (COUNT, 40), generator=generator)
    starts = torch.randint(0, 6, (COUNT, 1), generator=generator)
    ends = 8 + 32 * torch.arange(COUNT)[:, None] // COUNT
    response = (torch.arange(40) >= starts) & (torch.arange(40) < ends)
    return {
        "tokens": tokens,
        "response": response,
        "entropies": torch.rand(COUNT, 40, generator=generator) * response,
        "rewards": (torch.rand(COUNT, generator=generator) < 0.7).float(),
        "finished": torch.rand(COUNT, generator=generator) < 0.9,
        "group_ids": torch.arange(COUNT) // 3,
    }


def select(rows: dict[str, torch.Tensor], config: EchoRLConfig, group: Any = None) -> ClipSelection:
    steps = (rows["tokens"], rows["response"], BOUNDARIES)
    return select_clips(
        rows["entropies"],
        segment_steps(*steps),
        rewards=rows["rewards"],
        finished=rows["finished"],
        group_ids=rows["group_ids"],
        config=config,
        data_group=group,
        steps_before=count_steps_before(*steps),
        threshold=0.4 if config.fork_threshold == "running" else None,
    )


def _on_a_rank(config: EchoRLConfig, parts: list[int]) -> ClipSelection:
    first = sum(parts[: dist.get_rank()])
    own = slice(first, first + parts[dist.get_rank()])
    return select({name: values[own] for name, values in example().items()}, config, dist.group.WORLD)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("per_group", ["all", "top"])
def test_rows_of_other_ranks_count(ranks: Callable[..., list[Any]], world: int, per_group: str) -> None:
    for span in SPANS:
        config = EchoRLConfig(span=span, per_group=per_group, fork_threshold="running", normalizer="clip_tokens")
        whole = select(example(), config)
        assert whole.stats["clips"] > 3
        parts = ranks(world, _on_a_rank, config, PARTS[world])
        assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight), span
        assert torch.equal(torch.cat([part.peak_step for part in parts]), whole.peak_step)
        assert torch.equal(torch.cat([part.peak_entropy for part in parts]), whole.peak_entropy)
        for part in parts:
            assert part.stats == whole.stats and part.next_threshold == whole.next_threshold


def test_the_step_threshold_is_that_of_all_rows(ranks: Callable[..., list[Any]]) -> None:
    config = EchoRLConfig(span="fork_tokens", per_group="all")
    whole = select(example(), config)
    assert [part.stats for part in ranks(3, _on_a_rank, config, PARTS[3])] == [whole.stats] * 3
