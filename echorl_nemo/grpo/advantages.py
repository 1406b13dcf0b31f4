"""Advantages of rollouts within their groups, or within their batch, by `algo.estimator`.

Each estimator is a function of (rewards [N], group_ids [N], epsilon) that returns advantages [N]. A user's own function
has the same form.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from echorl_nemo.grpo.config import ESTIMATORS
from echorl_nemo.ops.results import tensor_of_shape


def group_advantages(rewards: Tensor, group_ids: Tensor, *, estimator: str, epsilon: float = 1e-6) -> Tensor:
    """The advantage of each rollout, [N] float32.

    ``rewards`` [N], ``group_ids`` [N] (the same for the rollouts of one prompt, in any order). `AlgoConfig.estimator`
    defines each estimator; standard deviations are unbiased, plus ``epsilon``. If all compared rewards are equal the
    advantages are exactly 0. Equality is tested on the rewards, since a mean of equal floats may differ by rounding.

    Raises ValueError for a group of one rollout, which has nothing to compare with, for rewards that the estimator is
    not defined for, and if a user's estimator does not return advantages.
    """
    advantages = ESTIMATORS.load(estimator)(rewards, group_ids, epsilon)
    return tensor_of_shape(advantages, rewards.shape, f"algo.estimator={estimator}").float()


@dataclass(frozen=True)
class Comparison:
    """Rewards compared with those of the same group."""

    centred: Tensor
    """[N] float64: the reward minus its group's mean."""
    deviation: Tensor
    """[N] float64: the unbiased standard deviation of its group."""
    size: Tensor
    """[N] int64: number of rollouts in its group."""
    equal: Tensor
    """[N] bool: all rewards of its group are equal."""

    def zero_if_equal(self, advantages: Tensor) -> Tensor:
        """``advantages`` [N] with exactly 0 where all compared rewards are equal."""
        return torch.where(self.equal, 0.0, advantages)


def compare_within_groups(rewards: Tensor, group_ids: Tensor) -> Comparison:
    """The rewards [N] relative to the mean of their group, with its standard deviation and size, and whether all
    rewards of the group are equal. Raises ValueError for a group of one rollout."""
    ids, index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    if (sizes < 2).any():
        lonely = ids[sizes < 2].tolist()
        raise ValueError(f"groups {lonely[:8]} have one rollout: advantages need rollout.group_size >= 2")
    values = rewards.double()
    mean = torch.zeros(len(ids), dtype=values.dtype, device=values.device).scatter_add_(0, index, values) / sizes
    centred = values - mean[index]
    squares = torch.zeros_like(mean).scatter_add_(0, index, centred.square())
    deviation = (squares / (sizes - 1)).sqrt()[index]
    return Comparison(centred, deviation, sizes[index], equal_rewards(rewards, group_ids))


def grpo(rewards: Tensor, group_ids: Tensor, epsilon: float) -> Tensor:
    """Reward minus its group's mean, divided by the group's standard deviation (arXiv 2402.03300, section 4.1.2)."""
    group = compare_within_groups(rewards, group_ids)
    return group.zero_if_equal(group.centred / (group.deviation + epsilon))


def dr_grpo(rewards: Tensor, group_ids: Tensor, epsilon: float) -> Tensor:
    """Reward minus its group's mean (arXiv 2503.20783, section 3.2)."""
    group = compare_within_groups(rewards, group_ids)
    return group.zero_if_equal(group.centred)


def rloo(rewards: Tensor, group_ids: Tensor, epsilon: float) -> Tensor:
    """Reward minus the mean of the other rollouts of its group (arXiv 2402.14740, section 3.2)."""
    group = compare_within_groups(rewards, group_ids)
    return group.zero_if_equal(group.centred * (group.size / (group.size - 1)))


def reinforce_plus_plus(rewards: Tensor, group_ids: Tensor, epsilon: float) -> Tensor:
    """Reward minus the batch's mean, divided by the batch's standard deviation (arXiv 2501.03262, section 3)."""
    return grpo(rewards, torch.zeros_like(group_ids), epsilon)


def maxrl(rewards: Tensor, group_ids: Tensor, epsilon: float) -> Tensor:
    """Reward minus its group's mean, divided by that mean; 0 in a group without reward (arXiv 2602.02710,
    algorithm 1). Raises ValueError for a reward below 0, with which the mean may be about 0 and the quotient
    anything."""
    if bool((rewards < 0).any()):
        raise ValueError(f"algo.estimator=maxrl is for rewards >= 0, and one is {float(rewards.min()):g}; use grpo")
    group = compare_within_groups(rewards, group_ids)
    mean = rewards.double() - group.centred
    return group.zero_if_equal(torch.where(mean > 0, group.centred / torch.where(mean > 0, mean, 1.0), 0.0))


def mcpo(rewards: Tensor, group_ids: Tensor, epsilon: float) -> Tensor:
    """`grpo`, divided by 2 sqrt(p (1 - p)) in groups whose mean reward p is above a half, for rewards of 0 and 1
    (arXiv 2604.16972, equations 12 and 13). Raises ValueError for a reward outside [0, 1], with which p is no share
    of successes."""
    outside = rewards[(rewards < 0) | (rewards > 1)]
    if len(outside):
        raise ValueError(f"algo.estimator=mcpo is for rewards of 0 to 1, and one is {float(outside[0]):g}; use grpo")
    group = compare_within_groups(rewards, group_ids)
    p = rewards.double() - group.centred
    scale = torch.where((p > 0.5) & (p < 1), 2 * (p * (1 - p)).sqrt(), 1.0)
    return grpo(rewards, group_ids, epsilon) / scale


def equal_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: all rewards of the rollout's group are equal."""
    ids, index = group_ids.unique(return_inverse=True)
    empty = torch.zeros(len(ids), dtype=rewards.dtype, device=rewards.device)
    lowest = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (lowest == highest)[index]
