"""What a step of 1024 rollouts of 9000 tokens sends: counted on four ranks, and by the plan's formula for 64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from echorl_nemo.echo import select_clips
from echorl_nemo.engines.megatron.columns import gather_columns
from echorl_nemo.engines.megatron.parallel import Parallel
from echorl_nemo.engines.megatron.worker import initialize_parallel
from echorl_nemo.plan.estimate import rollout_bytes
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import PLATFORM, tiny_config

Ranks = Callable[..., list[Any]]
GROUPS, GROUP_SIZE, WIDTH, STEP = 128, 8, 9000, 50


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """The bytes that this rank sends and receives meanwhile, in every function of torch.distributed that is called. Of
    a collective over n ranks, what a ring sends."""
    total = {"sent": 0.0, "received": 0.0}

    def nbytes(value: Any) -> int:
        return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else value.nbytes

    def watch(name: str, amounts: Callable[[Sequence[Any], int], tuple[float, float]]) -> Any:
        original = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            sent, received = amounts(args, dist.get_world_size(group))
            total["sent"] += sent
            total["received"] += received
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, watched)

    def never(name: str) -> Any:
        return mock.patch.object(dist, name, side_effect=AssertionError(f"{name} of rollouts"))

    with (
        watch("isend", lambda args, _: (nbytes(args[0]), 0)),
        watch("irecv", lambda args, _: (0, nbytes(args[0]))),
        watch("recv", lambda args, _: (0, nbytes(args[0]))),
        watch("broadcast", lambda args, n: (nbytes(args[0]) * (n - 1), nbytes(args[0]))),
        watch("all_gather", lambda args, n: (nbytes(args[1]) * (n - 1), nbytes(args[0]))),
        watch("all_reduce", lambda args, _: (2 * nbytes(args[0]), 2 * nbytes(args[0]))),
        never("all_gather_object"),
        never("gather_object"),
        never("broadcast_object_list"),
    ):
        yield total


def rollouts() -> RolloutBatch:
    """Of a step: every response has the full length, in steps of 50 tokens."""
    count = GROUPS * GROUP_SIZE
    return RolloutBatch(
        tokens=torch.ones(count, WIDTH, dtype=torch.long),
        response_mask=torch.ones(count, WIDTH, dtype=torch.bool),
        lengths=torch.full((count,), WIDTH),
        finished=torch.ones(count, dtype=torch.bool),
        group_ids=torch.arange(GROUPS).repeat_interleave(GROUP_SIZE),
        answers=["42"] * count,
        prompts=["?"] * count,
        responses=[f"{i:09d}".ljust(4 * WIDTH) for i in range(count)],  # four characters a token, each its own
        rollout_logprobs=torch.zeros(count, WIDTH),
        entropies=torch.rand(count, WIDTH, generator=torch.Generator().manual_seed(0)),
    )


def _share(config: RunConfig) -> tuple[dict[str, float], int, float, bool]:
    """On a rank: bytes of the exchange from the main rank, and of what selection gathers; rows; clips; main?"""
    parallel: Parallel = initialize_parallel(config, PLATFORM)
    held = rollouts() if parallel.is_main else None
    with counted() as total:
        batch = parallel.exchange_rollouts(held, list(range(GROUPS)))
        batch.rewards = torch.ones(len(batch))
        gather_columns(batch, parallel.rows_group)
        assert batch.entropies is not None
        steps = (torch.arange(WIDTH) // STEP).expand(len(batch), -1)
        selection = select_clips(
            batch.entropies, steps, rewards=batch.rewards, finished=batch.finished, group_ids=batch.group_ids,
            config=config.echorl, data_group=parallel.rows_group,
        )  # fmt: skip
    return total, len(batch), selection.stats["clips"], parallel.is_main


@pytest.mark.parametrize("layout", [["parallel.data=4"], ["parallel.tensor=2", "parallel.data=2"]])
def test_each_rank_gets_its_rollouts_and_columns_of_the_others(ranks: Ranks, layout: list[str]) -> None:
    config = tiny_config("echorl=paper", *layout)
    assert config.parallel.data is not None
    replicas, share = config.parallel.data, config.parallel.tensor
    whole, part = rollout_bytes(GROUPS * GROUP_SIZE, WIDTH, replicas=replicas, share=share)
    for total, rows, clips, is_main in ranks(4, _share, config):
        assert rows == GROUPS * GROUP_SIZE // replicas and clips == GROUPS
        columns = 2e7  # a value or a few for each rollout and step, to and from each replica
        assert total["sent"] < 1.01 * (whole if is_main else part) + columns
        assert total["received"] < 1.01 * (0 if is_main else part) + columns
        # the count sees what there is
        assert total["sent"] > 0.99 * whole if is_main else total["received"] > 0.99 * part


@pytest.mark.parametrize(("replicas", "share"), [(8, 8), (4, 16), (1, 64), (64, 1)])
def test_sixty_four_ranks_stay_below_200_megabytes(replicas: int, share: int) -> None:
    assert max(rollout_bytes(1024, 9000, replicas=replicas, share=share)) < 200e6
