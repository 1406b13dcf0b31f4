from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.echo import clip_denominator, clip_loss
from echorl_nemo.echo.config import NORMALIZERS


@given(
    st.integers(0, 2**31),
    st.sampled_from(tuple(NORMALIZERS)),
    st.sampled_from(["one", "probability"]),
    st.integers(1, 6),
)
def test_micro_batches_add_up_to_the_definition(seed: int, normalizer: str, token_weight: str, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(6, 9, generator=generator, dtype=torch.float64)
    response = torch.rand(6, 9, generator=generator) < 0.7
    clip = response & (torch.rand(6, 9, generator=generator) < 0.4) & (torch.rand(6, 1, generator=generator) < 0.6)
    weight = (torch.rand(6, 9, generator=generator) * 0.05 + 0.01) * clip  # sums below 1 are divided by, too
    counts = {
        "clip_mean": sum(bool(row.any()) for row in clip),
        "clip_tokens": float(weight.double().sum()),
        "response_tokens": int(response.sum()),
        "constant": 6 * 7.5,
    }
    total = 0.0
    for i in range(6):
        for j in range(9):
            nll = float(-logprobs[i, j])
            total += float(weight[i, j]) * nll * (float(logprobs[i, j].exp()) if token_weight == "probability" else 1.0)
    expected = total / counts[normalizer] if total else 0.0
    parts = list(zip(logprobs.split(size), weight.split(size), response.split(size), strict=True))
    denominator = sum(clip_denominator(w, r, normalizer, constant=len(w) * 7.5) for _, w, r in parts)
    losses = [clip_loss(lp, w, denominator, token_weight=token_weight) for lp, w, _ in parts]
    assert float(sum(losses)) == pytest.approx(expected, rel=1e-6)


def test_no_clip_gives_zero_and_a_zero_gradient() -> None:
    logprobs = torch.tensor([[-1.0, float("-inf")]], requires_grad=True)
    for token_weight in ("one", "probability"):
        loss = clip_loss(logprobs, torch.zeros(1, 2), 0, token_weight=token_weight)
        loss.backward()
        assert loss.item() == 0.0
        assert logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, 0.0]]


def test_the_probability_is_a_constant_factor() -> None:
    logprobs = torch.tensor([[-0.5, -2.0]], requires_grad=True)
    clip_loss(logprobs, torch.ones(1, 2), 2.0, token_weight="probability").backward()
    torch.testing.assert_close(logprobs.grad, -logprobs.detach().exp() / 2)


def _denominator_of_split_rows(weight: torch.Tensor, normalizer: str) -> float:
    own = weight.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    share = clip_denominator(own, own > 0, normalizer, group=dist.group.WORLD)
    dist.all_reduce(share)
    return float(share)


@pytest.mark.parametrize("normalizer", ["clip_mean", "clip_tokens", "response_tokens"])
def test_rows_split_over_context_parallel_ranks_are_counted_once(
    ranks: Callable[..., list[Any]], normalizer: str
) -> None:
    weight = torch.tensor([[0.0, 0.5, 0.5, 1.0], [0.0] * 4, [0.0, 0.0, 0.0, 0.25]])
    expected = float(clip_denominator(weight, weight > 0, normalizer))
    assert ranks(2, _denominator_of_split_rows, weight, normalizer) == [expected] * 2


def test_wrong_normalizers_are_refused() -> None:
    empty = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="normalizer='tokens' is not known"):
        clip_denominator(empty, empty > 0, "tokens")
    with pytest.raises(ValueError, match="give prompts x echorl.constant_length"):
        clip_denominator(empty, empty > 0, "constant")
