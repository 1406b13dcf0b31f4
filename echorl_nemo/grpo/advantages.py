"""Advantages of rollouts within their groups."""

import torch
from torch import Tensor

from echorl_nemo.grpo.config import ESTIMATORS


def group_advantages(rewards: Tensor, group_ids: Tensor, *, estimator: str, epsilon: float = 1e-6) -> Tensor:
    """The advantage of each rollout, [N] float32.

    ``rewards`` [N], ``group_ids`` [N] (the same for the rollouts of one prompt, in any order). ``grpo`` divides the
    centred reward by the group's standard deviation (unbiased, plus ``epsilon``), ``dr_grpo`` does not. A group
    whose rewards are all equal has advantages of exactly 0: equality is tested on the rewards, since a mean of equal
    floats may miss them by rounding.

    Raises ValueError for a group of one rollout, which has no mean to compare with.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"algo.estimator={estimator!r} is not known; use one of {', '.join(ESTIMATORS)}")
    ids, index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    if (sizes < 2).any():
        lonely = ids[sizes < 2].tolist()
        raise ValueError(f"groups {lonely[:8]} have one rollout: {estimator} advantages need rollout.group_size >= 2")
    values = rewards.double()
    mean = torch.zeros(len(ids), dtype=values.dtype, device=values.device).scatter_add_(0, index, values) / sizes
    centred = values - mean[index]
    if estimator == "grpo":
        squares = torch.zeros_like(mean).scatter_add_(0, index, centred.square())
        centred = centred / ((squares / (sizes - 1)).sqrt()[index] + epsilon)
    return torch.where(_equal_rewards(values, index, len(ids)), 0.0, centred).float()


def _equal_rewards(rewards: Tensor, index: Tensor, n_groups: int) -> Tensor:
    """[N] bool: the rollout's group has a single reward value."""
    empty = torch.zeros(n_groups, dtype=rewards.dtype, device=rewards.device)
    lowest = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (lowest == highest)[index]
