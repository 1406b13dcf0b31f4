import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.ops.entropy_threshold import entropy_threshold, running_threshold


@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from([0.01, 0.2, 0.3, 0.5, 0.9, 1.0]))
def test_the_threshold_is_the_quantile(seed: int, count: int, share: float) -> None:
    """torch's with interpolation="higher", which a linear one chooses the same tokens as."""
    generator = torch.Generator().manual_seed(seed)
    entropies = torch.rand(3, count, generator=generator) ** 8 * 12  # most near 0, as in practice
    inside = torch.rand(3, count, generator=generator) < 0.6
    found = entropy_threshold(entropies, inside, share)
    values = entropies[inside].double()
    if not len(values):
        assert found is None
        return
    expected = torch.quantile(values, 1 - share, interpolation="higher")
    assert found == float(expected)
    linear = torch.quantile(values, 1 - share)
    assert torch.equal(values >= found, values >= linear - 1e-12)


def test_zeros_and_rounding_below_zero_count_as_zero() -> None:
    entropies = torch.tensor([[-1e-8, -0.0, 0.0, 1e-30]])
    assert entropy_threshold(entropies, torch.ones(1, 4, dtype=torch.bool), 1.0) == 0.0
    assert entropy_threshold(entropies, torch.ones(1, 4, dtype=torch.bool), 0.25) == pytest.approx(1e-30)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    entropies = torch.tensor([[1.0, value, 2.0]])
    with pytest.raises(ValueError, match="the entropies are not all finite"):
        entropy_threshold(entropies, torch.ones(1, 3, dtype=torch.bool), 0.5)
    assert entropy_threshold(entropies, torch.tensor([[True, False, True]]), 1.0) == 1.0


def test_the_running_threshold_is_an_exponential_mean() -> None:
    mean: float | None = None
    for value in (None, 2.0, 4.0, None, 1.0):
        mean = running_threshold(mean, value, 0.75)
    assert mean is not None and math.isclose(mean, 0.75 * (0.75 * 2 + 0.25 * 4) + 0.25 * 1)
