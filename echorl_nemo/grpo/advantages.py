"""Advantages of rollouts within their groups, or within their batch."""

import torch
from torch import Tensor

from echorl_nemo.grpo.config import ESTIMATORS, GROUP_ESTIMATORS


def group_advantages(rewards: Tensor, group_ids: Tensor, *, estimator: str, epsilon: float = 1e-6) -> Tensor:
    """The advantage of each rollout, [N] float32.

    ``rewards`` [N], ``group_ids`` [N] (the same for the rollouts of one prompt, in any order). `AlgoConfig.estimator`
    defines each estimator; standard deviations are unbiased, plus ``epsilon``. If all compared rewards are equal the
    advantages are exactly 0. Equality is tested on the rewards, since a mean of equal floats may differ by rounding.

    Raises ValueError for a group of one rollout, which has nothing to compare with.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"algo.estimator={estimator!r} is not known; use one of {', '.join(ESTIMATORS)}")
    compared = group_ids if estimator in GROUP_ESTIMATORS else torch.zeros_like(group_ids)
    ids, index, sizes = compared.unique(return_inverse=True, return_counts=True)
    if (sizes < 2).any():
        lonely = ids[sizes < 2].tolist()
        raise ValueError(f"groups {lonely[:8]} have one rollout: {estimator} advantages need rollout.group_size >= 2")
    values = rewards.double()
    mean = torch.zeros(len(ids), dtype=values.dtype, device=values.device).scatter_add_(0, index, values) / sizes
    centred = values - mean[index]
    if estimator in ("grpo", "reinforce_plus_plus"):
        squares = torch.zeros_like(mean).scatter_add_(0, index, centred.square())
        centred = centred / ((squares / (sizes - 1)).sqrt()[index] + epsilon)
    elif estimator == "rloo":
        centred = centred * (sizes / (sizes - 1))[index]
    return torch.where(equal_rewards(rewards, compared), 0.0, centred).float()


def equal_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: all rewards of the rollout's group are equal."""
    ids, index = group_ids.unique(return_inverse=True)
    empty = torch.zeros(len(ids), dtype=rewards.dtype, device=rewards.device)
    lowest = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (lowest == highest)[index]
