import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.echo import segment_steps
from echorl_nemo.rollout.packing import pack_bins, pack_row

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(LENGTHS, st.integers(0, 5))
def test_rows_come_back_as_they_were(lengths: list[int], spare: int) -> None:
    width = sum(lengths) + spare
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.arange(1, 1 + inside.numel()).view(inside.shape) * inside
    row = pack_row(tokens, lengths, width)
    assert row.tokens[0].tolist() == tokens[inside].tolist() + [0] * spare
    assert row.positions[0].tolist() == [i for n in [*lengths, spare] for i in range(n)]
    assert row.cu_seqlens.diff().tolist() == lengths + ([spare] if spare else [])
    assert row.longest == max(*lengths, spare)
    assert torch.equal(row.unpack(row.tokens), tokens)


def test_gradients_of_unpacked_values_reach_their_tokens() -> None:
    row = pack_row(torch.tensor([[1, 2, 0], [3, 4, 5]]), [2, 3], 6)
    values = torch.zeros(1, 6, requires_grad=True)
    (row.unpack(values) * torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])).sum().backward()
    assert values.grad is not None and values.grad[0].tolist() == [1, 2, 3, 4, 5, 0]


def test_steps_of_an_unpacked_row_are_those_of_the_rollouts() -> None:
    tokens = torch.tensor([[5, 1, 5, 0], [5, 5, 1, 5]])
    inside = torch.tensor([[True, True, True, False], [True] * 4])
    row = pack_row(tokens, [3, 4], 8)
    assert torch.equal(
        segment_steps(row.unpack(row.tokens), inside, [1]),
        segment_steps(tokens, inside, [1]),
    )


@given(LENGTHS, st.integers(9, 30))
def test_bins_hold_every_rollout_once(lengths: list[int], capacity: int) -> None:
    rows = pack_bins(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= capacity
    # two rows that would fit into one would have been one
    assert all(a + b > capacity for i, a in enumerate(filled) for b in filled[:i])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a rollout of 7 tokens does not fit a packed row of 6"):
        pack_bins([3, 7], 6)
    with pytest.raises(ValueError, match="5 tokens do not fit a packed row of 4"):
        pack_row(torch.zeros(1, 5, dtype=torch.long), [5], 4)
