import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.echo import clip_denominator, clip_loss


@given(st.integers(0, 2**31), st.sampled_from(["clip_tokens", "response_tokens", "clips"]), st.integers(1, 6))
def test_micro_batches_add_up_to_the_definition(seed: int, normalizer: str, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(6, 9, generator=generator, dtype=torch.float64)
    response = torch.rand(6, 9, generator=generator) < 0.7
    clip = response & (torch.rand(6, 9, generator=generator) < 0.4) & (torch.rand(6, 1, generator=generator) < 0.6)
    counts = {
        "clip_tokens": int(clip.sum()),
        "response_tokens": int(response.sum()),
        "clips": sum(bool(row.any()) for row in clip),
    }
    total = sum(float(-logprobs[i, j]) for i in range(6) for j in range(9) if clip[i, j])
    expected = total / counts[normalizer] if total else 0.0
    denominator = sum(
        clip_denominator(c, r, normalizer) for c, r in zip(clip.split(size), response.split(size), strict=True)
    )
    parts = [clip_loss(lp, c, denominator) for lp, c in zip(logprobs.split(size), clip.split(size), strict=True)]
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-12)


def test_no_clip_gives_zero_and_a_zero_gradient() -> None:
    logprobs = torch.tensor([[-1.0, float("-inf")]], requires_grad=True)
    loss = clip_loss(logprobs, torch.zeros(1, 2, dtype=torch.bool), 0)
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, 0.0]]


def test_unknown_normalizer_is_refused() -> None:
    empty = torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="normalizer='tokens' is not known"):
        clip_denominator(empty, empty, "tokens")
