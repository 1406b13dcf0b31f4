"""Rollouts travel between ranks without a change; and what a step of 1024 rollouts of 9000 tokens costs each rank."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echorl_nemo.rollout.batch import RolloutBatch, blank_rollouts, concatenate, in_order, rows_of_groups
from echorl_nemo.rollout.exchange import broadcast_bytes, exchange_bytes, pack_rollouts, unpack_rollouts


def rollouts(groups: list[int], width: int = 12) -> RolloutBatch:
    """Two rollouts of each group, with every kind of field."""
    count = 2 * len(groups)
    generator = torch.Generator().manual_seed(sum(groups))
    lengths = torch.randint(3, width + 1, (count,), generator=generator)
    inside = torch.arange(width) < lengths[:, None]
    mask = (torch.arange(width) >= 2) & inside
    return RolloutBatch(
        tokens=torch.randint(1, 1 << 20, (count, width), generator=generator) * inside,
        response_mask=mask,
        lengths=lengths,
        finished=torch.rand(count, generator=generator) < 0.5,
        group_ids=torch.tensor(groups).repeat_interleave(2),
        answers=[f"answer {i}" for i in range(count)],
        responses=[f"response {i} \\n é" for i in range(count)],
        rollout_logprobs=torch.rand(count, width, generator=generator) * mask,
        entropies=torch.rand(count, width, generator=generator) * mask,
        rewards=torch.rand(count, generator=generator),
        reward_parts={"math": torch.rand(count, generator=generator)},
    )


def assert_equal(ours: RolloutBatch, theirs: RolloutBatch) -> None:
    for spec in fields(RolloutBatch):
        mine, other = getattr(ours, spec.name), getattr(theirs, spec.name)
        if isinstance(mine, Tensor):
            assert mine.dtype == other.dtype and torch.equal(mine, other), spec.name
        elif isinstance(mine, dict):
            assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
        else:
            assert mine == other, spec.name


@given(groups=st.lists(st.integers(0, 50), unique=True, max_size=5))
def test_packed_rollouts_come_out_as_they_went_in(groups: list[int]) -> None:
    batch = rollouts(groups)
    assert_equal(unpack_rollouts(pack_rollouts(batch)), batch)


def test_only_what_is_asked_for_is_packed() -> None:
    batch = rollouts(list(range(64)), width=500)
    part = batch.select([0, 1])
    assert len(pack_rollouts(part)) < len(pack_rollouts(batch)) / 30


def test_parts_are_put_in_the_order_of_the_groups() -> None:
    whole = rollouts([5, 3, 8, 1])
    parts = [whole.select(rows_of_groups(whole, ids)) for ids in ([8, 5], [], [1, 3])]
    assert_equal(in_order(parts, [5, 3, 8, 1]), whole.select(range(len(whole))))  # as wide as its longest


def test_blank_rollouts_have_no_weight() -> None:
    batch = rollouts([1])
    blank = blank_rollouts(batch, 3)
    assert len(blank) == 3 and not blank.response_mask.any() and blank.lengths.tolist() == [1, 1, 1]
    joined = concatenate([batch, blank])
    assert_equal(joined.select(range(len(batch))), batch.select(range(len(batch))))
    assert len(joined.select([2, 3]).answers) == 2
    assert len(blank_rollouts(rollouts([]), 2)) == 2


def _exchange() -> tuple[list[bytes], bytes]:
    import torch.distributed as dist

    rank, group = dist.get_rank(), dist.new_group(backend="gloo")
    # rank 0 sends to 0 and 2 only; rank 1 sends to all; rank 2 sends nothing
    parts = {0: [b"0 to 0", b"", b"0 to 2" * 1000], 1: [b"1 to 0", b"1 to 1", b"1 to 2"], 2: [b"", b"", b""]}[rank]
    received = exchange_bytes(parts, group, [0, 1, 2])
    return received, broadcast_bytes(b"from the first" if rank == 0 else None, group)


def test_each_rank_gets_what_was_sent_to_it(ranks: Callable[..., list[Any]]) -> None:
    results = ranks(3, _exchange)
    assert [received for received, _ in results] == [[b"1 to 0"], [], [b"0 to 2" * 1000, b"1 to 2"]]
    assert {sent for _, sent in results} == {b"from the first"}
