"""Filters that choose the rollouts of a step. All tensors are [N], over the rollouts of a batch."""

import torch
from torch import Tensor

from echorl_nemo.grpo.advantages import equal_rewards
from echorl_nemo.grpo.config import AlgoConfig


def counted_rollouts(advantages: Tensor, group_ids: Tensor, finished: Tensor, config: AlgoConfig) -> Tensor:
    """[N] bool: the rollouts that take part in the policy loss and in its denominators. ``advantages`` [N] or [N, S].

    With `denominator=live` only those of groups with an advantage other than 0; with `overlong_filter` only finished
    ones.
    """
    counted = torch.ones_like(finished)
    if config.denominator == "live":
        nonzero = advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(dim=1)
        counted = torch.isin(group_ids, group_ids[nonzero])
    return counted & finished if config.overlong_filter else counted


def effective_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: the rewards of the rollout's group differ, so that its group advantages are not all 0."""
    return ~equal_rewards(rewards, group_ids)


def all_success_groups(rewards: Tensor, group_ids: Tensor, success_reward: float) -> Tensor:
    """[N] bool: every rollout of the rollout's group has a reward of at least ``success_reward``."""
    _, index = group_ids.unique(return_inverse=True)
    failures = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=torch.long, device=rewards.device)
    failures.scatter_add_(0, index, (rewards < success_reward).long())
    return failures[index] == 0


def overlong_penalty(response_lengths: Tensor, budget: int, config: AlgoConfig) -> Tensor:
    """The amount to subtract from each rollout's reward for its length, [N] float32 >= 0 (DAPO, arXiv 2503.14476,
    equation 13): 0 up to ``budget`` - `overlong_buffer` tokens, then linearly up to `overlong_penalty` at
    ``budget``."""
    if config.overlong_buffer == 0:
        return torch.zeros(response_lengths.shape, device=response_lengths.device)
    excess = (response_lengths - (budget - config.overlong_buffer)).float() / config.overlong_buffer
    return excess.clamp(0, 1) * config.overlong_penalty
