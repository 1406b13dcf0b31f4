import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echorl_nemo.grpo import AlgoConfig, LossInputs, StepTotals, kl_estimate, policy_loss
from echorl_nemo.grpo.config import AGGREGATIONS, KL_ESTIMATORS, LOSSES

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
        "rollout_logprobs": (old + 2 * (uniform(N, S) - 0.5)) * mask,
        "reference_logprobs": -uniform(N, S) * mask,
        "advantages": 2 * uniform(N) - 1,
        "response_mask": mask,
        "counted": uniform(N) < 0.8,
        "entropies": uniform(N, S) * mask,
    }


def totals_of(inputs: dict[str, Any]) -> StepTotals:
    mask, counted = inputs["response_mask"], inputs["counted"]
    return StepTotals(float(counted.sum()), float(mask[counted].sum()), float(mask.sum()))


def slow_loss(inputs: dict[str, Tensor], config: AlgoConfig) -> float:
    """The papers' formulas in plain loops."""
    rows = [i for i in range(N) if inputs["counted"][i]]
    mask = inputs["response_mask"].tolist()
    tokens = sum(sum(mask[i]) for i in rows)
    loss = 0.0
    for i in rows:
        inside = [t for t in range(S) if mask[i][t]]
        weight = {
            "rollout_mean": 1 / (max(1, len(inside)) * len(rows)),
            "token_mean": 1 / max(1, tokens),
            "constant": 1 / (len(rows) * config.constant_length),
        }[config.aggregation]
        advantage = float(inputs["advantages"][i])
        ratios = {t: math.exp(float(inputs["logprobs"][i, t] - inputs["old_logprobs"][i, t])) for t in inside}
        if config.loss == "gspo" and inside:
            mean = math.exp(sum(map(math.log, ratios.values())) / len(inside))
            ratios = dict.fromkeys(inside, mean)
        for t, ratio in ratios.items():
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            if config.loss == "cispo":
                token = -clipped * advantage * float(inputs["logprobs"][i, t])
            else:
                token = -min(ratio * advantage, clipped * advantage)
            mismatch = math.exp(float(inputs["old_logprobs"][i, t] - inputs["rollout_logprobs"][i, t]))
            if (config.icepop_low or 0) <= mismatch <= (config.icepop_high or math.inf):
                loss += weight * token * (min(mismatch, config.tis_cap) if config.tis_cap else 1.0)
            loss -= weight * config.entropy_coef * float(inputs["entropies"][i, t])
            log_r = float(inputs["reference_logprobs"][i, t] - inputs["logprobs"][i, t])
            kl = {"k1": -log_r, "k2": log_r**2 / 2, "k3": math.exp(log_r) - 1 - log_r}[config.kl_estimator]
            if config.kl_in == "loss":
                loss += weight * config.kl_coef * kl
    return loss


@st.composite
def configs(draw: st.DrawFn) -> AlgoConfig:
    return AlgoConfig(
        loss=draw(st.sampled_from(tuple(LOSSES))),
        aggregation=draw(st.sampled_from(tuple(AGGREGATIONS))),
        clip_low=draw(st.sampled_from([0.05, 0.2, 1.0])),
        clip_high=draw(st.sampled_from([0.05, 0.28])),
        constant_length=5,
        entropy_coef=draw(st.sampled_from([0.0, 0.01])),
        kl_coef=draw(st.sampled_from([0.0, 0.1])),
        kl_estimator=draw(st.sampled_from(tuple(KL_ESTIMATORS))),
        kl_in=draw(st.sampled_from(["loss", "reward"])),
        tis_cap=draw(st.sampled_from([None, 1.2])),
        icepop_low=draw(st.sampled_from([None, 0.7])),
        icepop_high=draw(st.sampled_from([None, 1.4])),
    )


@given(st.integers(0, 2**31), configs(), st.integers(1, N))
def test_loss_and_metrics_of_micro_batches_add_up_to_the_formula(seed: int, config: AlgoConfig, size: int) -> None:
    inputs = random_inputs(seed)
    totals = totals_of(inputs)
    parts = [
        policy_loss(LossInputs(**{name: value[i : i + size] for name, value in inputs.items()}, totals=totals), config)
        for i in range(0, N, size)
    ]
    assert float(sum(part.loss for part in parts)) == pytest.approx(slow_loss(inputs, config), rel=1e-5, abs=1e-9)
    whole = policy_loss(LossInputs(**inputs, totals=totals), config)
    for name, value in whole.metrics.items():
        assert float(sum(part.metrics[name] for part in parts)) == pytest.approx(float(value), rel=1e-5, abs=1e-9)
    tokens = int(inputs["response_mask"].sum())
    assert float(whole.metrics["entropy"]) == pytest.approx(float(inputs["entropies"].sum()) / max(1, tokens), rel=1e-6)


def gradient(inputs: dict[str, Any], config: AlgoConfig) -> Tensor:
    logprobs = inputs["logprobs"].clone().requires_grad_()
    policy_loss(LossInputs(**{**inputs, "logprobs": logprobs}, totals=totals_of(inputs)), config).loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_advantages_give_an_exactly_zero_gradient(loss: str) -> None:
    inputs = random_inputs(0)
    inputs["advantages"] = torch.zeros(N)
    inputs["logprobs"][0] = -1e6  # a ratio that would overflow is no NaN
    inputs["old_logprobs"][1] = -1e6
    assert gradient(inputs, AlgoConfig(loss=loss)).eq(0).all()


def test_clipped_gradients_by_example() -> None:
    inputs = random_inputs(0) | {
        "logprobs": torch.full((N, S), math.log(1.25)),
        "old_logprobs": torch.zeros(N, S),
        "advantages": torch.ones(N),
        "response_mask": torch.ones(N, S, dtype=torch.bool),
        "counted": torch.ones(N, dtype=torch.bool),
    }
    assert gradient(inputs, AlgoConfig(clip_high=0.2)).eq(0).all()
    assert gradient(inputs, AlgoConfig(clip_high=0.28)).lt(0).all()  # clip-higher lets a rising token rise further
    # CISPO keeps the gradient of every token, at the clipped weight
    torch.testing.assert_close(gradient(inputs, AlgoConfig(loss="cispo")), torch.full((N, S), -1.2 / N / S))


def test_gspo_moves_the_tokens_of_a_response_together() -> None:
    inputs = random_inputs(1) | {"response_mask": torch.ones(N, S, dtype=torch.bool)}
    slope = gradient(inputs, AlgoConfig(loss="gspo", clip_low=0.9, clip_high=9.0))
    torch.testing.assert_close(slope, slope[:, :1].expand(N, S))
    assert slope[inputs["counted"]].ne(0).all() and slope[~inputs["counted"]].eq(0).all()


def test_dead_groups_do_not_dilute() -> None:
    inputs = random_inputs(2) | {"counted": torch.tensor([True, True, False, False])}
    config = AlgoConfig(aggregation="token_mean", kl_coef=0.1, entropy_coef=0.1)
    short = {name: value[:2] for name, value in inputs.items()}
    diluted = inputs | {"counted": torch.ones(N, dtype=torch.bool)}
    assert torch.equal(gradient(inputs, config)[:2], gradient(short, config))
    assert gradient(inputs, config)[2:].eq(0).all()
    assert not torch.equal(gradient(diluted, config)[:2], gradient(short, config))


def test_an_advantage_for_each_token() -> None:
    inputs = random_inputs(3)
    config = AlgoConfig(aggregation="token_mean")
    per_token = {**inputs, "advantages": inputs["advantages"][:, None].expand(N, S)}
    assert torch.equal(gradient(inputs, config), gradient(per_token, config))


def test_kl_estimators_have_the_right_mean() -> None:
    """k1 and k3 are unbiased; k2 is close where the policies are close."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    for estimator, tolerance in (("k1", 1e-12), ("k3", 1e-12), ("k2", 2e-3)):
        mean = float((p * kl_estimate(p.log(), q.log(), estimator=estimator)).sum())
        assert mean == pytest.approx(exact, abs=tolerance)
    with pytest.raises(ValueError, match="algo.kl_estimator='k4' is not known; use one of k1, k2, k3"):
        kl_estimate(p, q, estimator="k4")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"estimator": "gae"}, "algo.estimator='gae' is not known; use one of grpo, dr_grpo, rloo, reinforce_plus"),
        ({"loss": "ppo"}, "algo.loss='ppo' is not known; use one of clipped, gspo, cispo"),
        ({"aggregation": "mean"}, "algo.aggregation='mean' is not known"),
        ({"denominator": "dead"}, "algo.denominator='dead' is not known; use one of live, all"),
        ({"clip_low": 1.1}, r"algo.clip_low=1.1 must lie in \[0, 1\]"),
        ({"clip_high": -0.1}, "algo.clip_high=-0.1 must lie in"),
        ({"entropy_coef": -0.1}, "algo.entropy_coef=-0.1 must lie in"),
        ({"constant_length": 0}, "algo.constant_length=0 must lie in"),
        ({"tis_cap": 0.0}, r"algo.tis_cap=0.0 must lie in \(0, 1000000\]; null is off"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgoConfig(**setting)


def test_metrics_are_means_over_the_tokens_that_count() -> None:
    """A KL of .5 at every token of 2 live rollouts of 8 is .5, not .125."""
    live = torch.arange(8) < 2
    mask = torch.ones(8, 3, dtype=torch.bool)
    zero = torch.zeros(8, 3)
    inputs = LossInputs(
        logprobs=zero, old_logprobs=zero, advantages=live.float(), response_mask=mask, counted=live, entropies=zero + 2,
        totals=StepTotals(2.0, 6.0, 24.0), reference_logprobs=zero - 0.5, rollout_logprobs=zero - 9.0,
    )  # fmt: skip
    metrics = policy_loss(inputs, AlgoConfig(kl_coef=0.1, kl_estimator="k1", icepop_high=2.0)).metrics
    assert float(metrics["kl_reference"]) == pytest.approx(0.5)
    assert float(metrics["mismatch_dropped"]) == pytest.approx(1.0)
    assert float(metrics["entropy"]) == pytest.approx(2.0)
    off_policy = LossInputs(**{**vars(inputs), "old_logprobs": zero - 1.0, "rollout_logprobs": zero - 1.0})
    metrics = policy_loss(off_policy, AlgoConfig()).metrics
    assert float(metrics["ratio_clipped"]) == pytest.approx(1.0)
    assert float(metrics["kl_old"]) == pytest.approx(math.e - 2)
