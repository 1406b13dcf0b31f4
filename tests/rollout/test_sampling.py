import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.rollout.sampling import keep_top_k, keep_top_p, rollout_uniforms, sample_tokens


def draw(logits: torch.Tensor, count: int, **settings: float) -> torch.Tensor:
    """Shares of tokens over ``count`` evenly spread uniforms."""
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | settings
    tokens = sample_tokens(logits.expand(count, -1), uniforms, **options)  # type: ignore[arg-type]
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 2.0]))
def test_shares_follow_the_distribution(seed: int, temperature: float) -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 2
    shares = draw(logits, 2000, temperature=temperature)
    torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=2e-3, rtol=0)


def test_masked_tokens_are_never_taken() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for uniform in (0.0, 0.5, 1.0 - 2**-53):
        token = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1, top_p=1, top_k=0)
        assert token.item() in (1, 3)


def test_top_k_and_top_p_by_example() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert draw(logits, 100, top_k=2).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.011)
    assert draw(logits, 100, top_p=0.75).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.011)
    assert draw(logits, 100, top_p=0.76).tolist() == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0], abs=0.011)
    assert draw(logits, 10, top_p=1e-9).tolist() == [1, 0, 0, 0]  # the likeliest token always stays


def test_filters_keep_what_they_say() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    assert keep_top_k(logits, 2).isfinite().tolist() == [[True, False, True, True]]  # with ties
    assert keep_top_k(logits, 9).isfinite().all()
    probs = torch.tensor([[0.1, 0.6, 0.3]])
    assert keep_top_p(probs, 0.6).gt(0).tolist() == [[False, True, False]]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(torch.tensor([0.0, 2.0, 1.0]), 5, temperature=0).tolist() == [0, 1, 0]


def test_uniforms_differ_by_seed_group_and_member_alone() -> None:
    table = {
        (seed, group, member): tuple(rollout_uniforms(seed, group, member, 3).tolist())
        for seed in range(3)
        for group in range(5)
        for member in range(5)
    }
    assert len(set(table.values())) == len(table)
    assert table[1, 2, 3] == tuple(rollout_uniforms(1, 2, 3, 3).tolist())
    assert table[1, 2, 3] == tuple(rollout_uniforms(1, 2, 3, 30)[:3].tolist())
