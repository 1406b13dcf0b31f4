import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echorl_nemo.grpo import AlgoConfig, LossInputs, StepTotals, policy_loss
from echorl_nemo.grpo.config import AGGREGATIONS

N, S = 4, 6


def random_inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, S, generator=generator) < 0.7

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    old = -uniform(N, S) * mask
    return {
        "logprobs": (old + 0.6 * (uniform(N, S) - 0.5)) * mask,
        "old_logprobs": old,
        "advantages": 2 * uniform(N) - 1,
        "response_mask": mask,
        "entropies": uniform(N, S) * mask,
    }


def totals_of(mask: Tensor) -> StepTotals:
    return StepTotals(rollouts=float(len(mask)), tokens=float(mask.sum()))


def slow_loss(inputs: dict[str, Tensor], config: AlgoConfig) -> float:
    """The papers' formulas in plain loops."""
    mask = inputs["response_mask"].tolist()
    tokens = sum(map(sum, mask))
    loss = 0.0
    for i in range(N):
        length = sum(mask[i])
        weight = {
            "rollout_mean": 1 / (max(1, length) * N),
            "token_mean": 1 / max(1, tokens),
            "constant": 1 / (N * config.constant_length),
        }[config.aggregation]
        advantage = float(inputs["advantages"][i])
        for t in range(S):
            if mask[i][t]:
                ratio = math.exp(float(inputs["logprobs"][i, t] - inputs["old_logprobs"][i, t]))
                clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                loss -= weight * min(ratio * advantage, clipped * advantage)
                loss -= weight * config.entropy_coef * float(inputs["entropies"][i, t])
    return loss


@given(st.integers(0, 2**31), st.sampled_from(AGGREGATIONS), st.sampled_from([0.0, 0.01]), st.integers(1, N))
def test_loss_and_metrics_of_micro_batches_add_up_to_the_formula(
    seed: int, aggregation: str, entropy_coef: float, size: int
) -> None:
    config = AlgoConfig(aggregation=aggregation, clip_high=0.28, constant_length=5, entropy_coef=entropy_coef)
    inputs = random_inputs(seed)
    totals = totals_of(inputs["response_mask"])
    parts = [
        policy_loss(LossInputs(**{name: value[i : i + size] for name, value in inputs.items()}, totals=totals), config)
        for i in range(0, N, size)
    ]
    assert float(sum(part.loss for part in parts)) == pytest.approx(slow_loss(inputs, config), rel=1e-6, abs=1e-12)
    whole = policy_loss(LossInputs(**inputs, totals=totals), config)
    for name, value in whole.metrics.items():
        assert float(sum(part.metrics[name] for part in parts)) == pytest.approx(float(value), rel=1e-6, abs=1e-9)
    tokens = int(inputs["response_mask"].sum())
    assert float(whole.metrics["entropy"]) == pytest.approx(float(inputs["entropies"].sum()) / max(1, tokens), rel=1e-6)


def gradient(inputs: dict[str, Any], config: AlgoConfig) -> Tensor:
    logprobs = inputs["logprobs"].clone().requires_grad_()
    totals = totals_of(inputs["response_mask"])
    policy_loss(LossInputs(**{**inputs, "logprobs": logprobs}, totals=totals), config).loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad


def test_zero_advantages_give_an_exactly_zero_gradient() -> None:
    inputs = random_inputs(0)
    inputs["advantages"] = torch.zeros(N)
    inputs["logprobs"][0] = -1e6  # a ratio that would overflow is no NaN
    inputs["old_logprobs"][1] = -1e6
    assert gradient(inputs, AlgoConfig()).eq(0).all()


def test_clip_higher_lets_rising_tokens_rise_further() -> None:
    inputs = random_inputs(0) | {
        "logprobs": torch.full((N, S), math.log(1.25)),
        "old_logprobs": torch.zeros(N, S),
        "advantages": torch.ones(N),
        "response_mask": torch.ones(N, S, dtype=torch.bool),
    }
    assert gradient(inputs, AlgoConfig(clip_high=0.2)).eq(0).all()
    assert gradient(inputs, AlgoConfig(clip_high=0.28)).lt(0).all()


def test_one_loss_for_each_token_advantage() -> None:
    inputs = random_inputs(3)
    config = AlgoConfig(aggregation="token_mean")
    per_token = {**inputs, "advantages": inputs["advantages"][:, None].expand(N, S)}
    assert torch.equal(gradient(inputs, config), gradient(per_token, config))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"estimator": "gae"}, "algo.estimator='gae' is not known; use one of grpo, dr_grpo"),
        ({"aggregation": "mean"}, "algo.aggregation='mean' is not known"),
        ({"clip_low": 1.0}, r"algo.clip_low=1.0 must lie in \[0, 1\)"),
        ({"clip_high": -0.1}, "algo.clip_high=-0.1 is negative"),
        ({"constant_length": 0}, "algo.constant_length=0 must be at least 1 token"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgoConfig(**setting)
