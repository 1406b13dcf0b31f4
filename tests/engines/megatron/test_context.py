"""Context parallelism: which positions a rank holds, and whole sequences in generation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.checks.model_build import _split_window_problems
from echorl_nemo.engines.megatron.context import whole_sequences
from echorl_nemo.engines.megatron.model_settings import rotary_embeddings
from echorl_nemo.engines.megatron.zigzag import held_positions, natural_order, round_up
from echorl_nemo.schema import ParallelConfig, RunConfig
from tests.engines.megatron.helpers import tiny_config, trainer_of


class _Group:
    """The size and rank of a context group."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = (lambda: size), (lambda: rank)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 4))
def test_the_order_is_megatrons(chunks: list[int], size: int) -> None:
    """Of each sequence of a packed row, the positions whose embeddings Megatron-Core gives the rank."""
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    sizes = [2 * size * chunk for chunk in chunks]
    for rank in range(size):
        start, expected = 0, []
        for tokens in sizes:
            positions = torch.arange(start, start + tokens).view(-1, 1, 1, 1)
            expected.append(get_pos_emb_on_this_cp_rank(positions, 0, _Group(size, rank)).flatten())
            start += tokens
        assert torch.equal(held_positions(sizes, size, rank), torch.cat(expected))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_the_ranks_hold_every_position_once(chunks: list[int], size: int) -> None:
    sizes = [2 * size * chunk for chunk in chunks]
    gathered = torch.cat([held_positions(sizes, size, rank) for rank in range(size)])
    assert torch.equal(gathered[natural_order(sizes, size)], torch.arange(sum(sizes)))


@given(st.integers(0, 1000), st.integers(1, 16))
def test_rounding_up(count: int, multiple: int) -> None:
    assert round_up(count, multiple) == min(n for n in range(count, count + multiple) if n % multiple == 0)


def _groups(config: RunConfig) -> list[Any]:
    trainer = trainer_of(config)
    model, seen = trainer.policy.model, []
    (rotary,) = rotary_embeddings(model.module)

    def record() -> None:
        seen.append((model.config.context_parallel_size, rotary.cp_group is None, len(rotary(8))))

    record()
    with whole_sequences(model):
        record()
    record()
    return seen


def test_whole_sequences_end_with_the_block(ranks: Callable[..., list[Any]]) -> None:
    """No embedding that was remembered under one setting is used under the other."""
    for seen in ranks(2, _groups, tiny_config("parallel.context=2")):
        assert seen == [(2, False, 4), (1, True, 8), (2, False, 4)]


@pytest.mark.parametrize("context", [1, 2])
def test_a_window_is_not_split_by_transformer_engine(context: int) -> None:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "sliding_window": 8}
    found = _split_window_problems(ParallelConfig(context=context), AutoConfig.for_model("mistral", **sizes))
    assert len(found) == context - 1
    assert not found or found[0].startswith("parallel.context=2: the model has an attention window of 8 tokens")
