import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.grpo import AlgoConfig, group_advantages
from echorl_nemo.grpo.config import ESTIMATORS, SUCCESS_ESTIMATORS


def _mcpo_scale(rewards: list[float]) -> float:
    p = statistics.fmean(rewards)
    return 2 * math.sqrt(p * (1 - p)) if 0.5 < p < 1 else 1.0


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-8, 8).map(lambda n: n / 4)), min_size=1, max_size=12),
    st.sampled_from(tuple(ESTIMATORS)),
)
def test_advantages_equal_their_formula(members: list[tuple[int, float]], estimator: str) -> None:
    if estimator in SUCCESS_ESTIMATORS:
        members = [(group, abs(reward) / 2) for group, reward in members]  # in [0, 1]
    members = [*members, *[(group, 0.1) for group, _ in members]]  # no group of one
    groups = torch.tensor([group for group, _ in members])
    rewards = torch.tensor([reward for _, reward in members], dtype=torch.float64)
    result = group_advantages(rewards, groups, estimator=estimator)
    for row, (group, reward) in enumerate(members):
        own = [r for g, r in members if g == group or estimator == "reinforce_plus_plus"]
        others = [r for i, (g, r) in enumerate(members) if g == group and i != row]
        expected = {
            "grpo": (reward - statistics.fmean(own)) / (statistics.stdev(own) + 1e-6),
            "dr_grpo": reward - statistics.fmean(own),
            "rloo": reward - statistics.fmean(others),
            "reinforce_plus_plus": (reward - statistics.fmean(own)) / (statistics.stdev(own) + 1e-6),
            "maxrl": reward / max(1e-9, statistics.fmean(own)) - 1 if statistics.fmean(own) > 1e-9 else 0.0,
            "mcpo": (reward - statistics.fmean(own)) / (statistics.stdev(own) + 1e-6) / _mcpo_scale(own),
        }[estimator]
        if len(set(own)) == 1:
            expected = 0.0
        assert float(result[row]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_give_exactly_zero_whatever_their_rounding(estimator: str) -> None:
    rewards = torch.full((7,), 0.1)  # the mean of seven times 0.1 is not 0.1
    assert group_advantages(rewards, torch.zeros(7, dtype=torch.long), estimator=estimator).tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("estimator", "reward", "message"),
    [
        ("maxrl", -0.5, "algo.estimator=maxrl is for rewards >= 0, and one is -0.5; use grpo"),
        ("mcpo", -0.5, "algo.estimator=mcpo is for rewards of 0 to 1, and one is -0.5; use grpo"),
        ("mcpo", 1.5, "algo.estimator=mcpo is for rewards of 0 to 1, and one is 1.5; use grpo"),
    ],
)
def test_rewards_that_an_estimator_is_not_defined_for_are_refused(estimator: str, reward: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        group_advantages(torch.tensor([0.5, reward]), torch.zeros(2, dtype=torch.long), estimator=estimator)


@pytest.mark.parametrize("estimator", SUCCESS_ESTIMATORS)
@pytest.mark.parametrize("shaping", [{"kl_coef": 0.1, "kl_in": "reward"}, {"overlong_buffer": 16}])
def test_estimators_by_successes_refuse_shaped_rewards(estimator: str, shaping: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(shaping)[-1]}=.* with algo.estimator={estimator}: it divides by"):
        AlgoConfig(estimator=estimator, **shaping)
    AlgoConfig(estimator=estimator, kl_coef=0.1)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups \[5\] have one rollout: advantages need rollout.group_size >= 2"):
        group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4, 4, 5]), estimator="grpo")


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="algo.estimator='ppo' is not known; use one of grpo, dr_grpo, rloo"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), estimator="ppo")
