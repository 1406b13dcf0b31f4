"""The hinge-KL of MCPO against its formula in plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.grpo import AlgoConfig, LossInputs, StepTotals, policy_loss
from tests.grpo.test_loss import N, S, random_inputs, totals_of


def k3(drift: float) -> float:
    return math.exp(drift) - drift - 1


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.01, 0.2]), st.integers(1, N))
def test_mcpo(seed: int, budget: float, size: int) -> None:
    inputs = random_inputs(seed)
    inputs["mastered"] = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.6
    rows = [i for i in range(N) if inputs["mastered"][i]]
    expected = 0.0
    for i in rows:
        inside = [t for t in range(S) if inputs["response_mask"][i, t]]
        for t in inside:
            drift = float(inputs["logprobs"][i, t] - inputs["old_logprobs"][i, t])
            if abs(drift) > budget:
                expected += (k3(drift) - k3(math.copysign(budget, drift))) / len(inside) / len(rows)
    counts = totals_of(inputs)
    totals = StepTotals(counts.rollouts, counts.tokens, counts.response_tokens, mastered=float(len(rows)))
    losses = {}
    for anchor in ("none", "mcpo"):
        config = AlgoConfig(anchor=anchor, anchor_budget=budget, anchor_coef=2.0)
        parts = [
            policy_loss(
                LossInputs(**{name: value[i : i + size] for name, value in inputs.items()}, totals=totals), config
            )
            for i in range(0, N, size)
        ]
        losses[anchor] = float(sum(part.loss for part in parts))
        reported = float(sum(part.metrics["anchor_loss"] for part in parts))
        assert reported == pytest.approx(expected if anchor == "mcpo" else 0.0, rel=1e-5, abs=1e-6)
    assert losses["mcpo"] - losses["none"] == pytest.approx(2 * expected, rel=1e-4, abs=1e-5)


def test_within_the_budget_there_is_no_gradient() -> None:
    inputs = random_inputs(0)
    inputs["old_logprobs"] = inputs["logprobs"].detach() + 0.005 * inputs["response_mask"]
    inputs["advantages"] = torch.zeros(N)
    inputs["mastered"] = torch.ones(N, dtype=torch.bool)
    logprobs = inputs["logprobs"].clone().requires_grad_()
    totals = StepTotals(N, 10.0, 10.0, mastered=N)
    policy_loss(
        LossInputs(**{**inputs, "logprobs": logprobs}, totals=totals), AlgoConfig(anchor="mcpo")
    ).loss.backward()
    assert logprobs.grad is not None and not logprobs.grad.any()


def test_it_needs_the_mastered_rollouts() -> None:
    inputs = random_inputs(0)
    with pytest.raises(ValueError, match="algo.anchor=mcpo needs the rollouts of all-correct groups"):
        policy_loss(LossInputs(**inputs, totals=totals_of(inputs)), AlgoConfig(anchor="mcpo"))
