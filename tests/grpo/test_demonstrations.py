"""LUFFY's loss and UFT's hints against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.grpo import AlgoConfig, LossInputs, policy_loss
from echorl_nemo.grpo.demonstrations import HINT_PARTS, hint_length, hint_share
from tests.grpo.test_loss import N, S, random_inputs, totals_of


@given(st.integers(0, 2**31), st.sampled_from([0.1, 1.0]), st.sampled_from(["clipped", "gspo", "cispo"]))
def test_an_experts_tokens_have_the_shaped_loss(seed: int, gamma: float, loss: str) -> None:
    inputs = random_inputs(seed)
    expert = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.5
    config = AlgoConfig(loss=loss, aggregation="token_mean", luffy_gamma=gamma)
    totals = totals_of(inputs)
    found = policy_loss(LossInputs(**inputs, totals=totals, expert=expert), config)
    own = {**inputs, "counted": inputs["counted"] & ~expert}
    expected = float(policy_loss(LossInputs(**own, totals=totals), config).loss)
    for i in range(N):
        for t in range(S):
            if expert[i] and inputs["counted"][i] and inputs["response_mask"][i, t]:
                pi = math.exp(float(inputs["logprobs"][i, t]))
                expected -= float(inputs["advantages"][i]) * pi / (pi + gamma) / max(1.0, totals.tokens)
    assert float(found.loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)  # weights are float32
    assert float(found.metrics["ratio_clipped"]) == pytest.approx(
        float(policy_loss(LossInputs(**own, totals=totals), config).metrics["ratio_clipped"])
    )


def test_the_share_of_hints_falls_as_a_cosine() -> None:
    config = AlgoConfig(hint_steps=300, hint_high=0.95, hint_low=0.05)
    for step in (0, 10, 149, 299):
        expected = 0.05 + 0.5 * 0.9 * (1 + math.cos(math.pi * (step + 1) / 300))
        assert hint_share(config, step) == pytest.approx(expected)
    assert hint_share(config, 299) == pytest.approx(0.05) and hint_share(config, 300) == 0.0


def test_hints_that_would_grow_are_refused() -> None:
    with pytest.raises(ValueError, match="algo.hint_low=0.95 is above algo.hint_high=0.05"):
        AlgoConfig(demonstrations="uft", hint_low=0.95, hint_high=0.05)


def test_hints_are_binomially_many_fifths() -> None:
    config = AlgoConfig(hint_steps=100, hint_high=1.0, hint_low=0.0)
    for step, share in ((0, hint_share(config, 0)), (49, 0.5)):
        lengths = torch.tensor([hint_length(50, config, step=step, seed=seed) for seed in range(2000)]).double()
        assert set(lengths.tolist()) <= {50 / HINT_PARTS * part for part in range(HINT_PARTS + 1)}
        assert abs(float(lengths.mean()) / 50 - share) < 0.02
    assert hint_length(50, config, step=49, seed=3) == hint_length(50, config, step=49, seed=3)
    assert hint_length(50, config, step=100, seed=3) == hint_length(0, config, step=0, seed=3) == 0
    assert 0 <= hint_length(2, config, step=0, seed=3) <= 2
