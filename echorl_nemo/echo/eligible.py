"""The rollouts that may have a clip: by their rewards (`echorl.scope`), and within their group (`echorl.per_group`).

All tensors are [N], over the rollouts of a batch.
"""

import torch
from torch import Tensor

from echorl_nemo.echo.config import SCOPES, EchoRLConfig


def eligible_rollouts(rewards: Tensor, finished: Tensor, group_ids: Tensor, config: EchoRLConfig) -> Tensor:
    """[N] bool: the finished verified successes; with scope `degenerate` only those of all-success groups."""
    eligible: Tensor = SCOPES.load(config.scope)(rewards >= config.success_reward, group_ids)
    return eligible & finished


def success(successes: Tensor, group_ids: Tensor) -> Tensor:
    """Scope `success`: every verified success. ``successes`` [N] bool."""
    return successes


def degenerate(successes: Tensor, group_ids: Tensor) -> Tensor:
    """Scope `degenerate`: the successes of groups in which every rollout is a success. ``successes`` [N] bool,
    ``group_ids`` [N]."""
    _, index = group_ids.unique(return_inverse=True)
    failures = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=torch.long, device=successes.device)
    failures.scatter_add_(0, index, (~successes).long())
    return successes & (failures[index] == 0)


def all_of_group(peak_entropy: Tensor, eligible: Tensor, group_ids: Tensor) -> Tensor:
    """`per_group=all`: every eligible rollout."""
    return eligible


def top_of_group(peak_entropy: Tensor, eligible: Tensor, group_ids: Tensor) -> Tensor:
    """`per_group=top`: for each group the eligible rollout with the highest peak, the earliest on ties: the paper's."""
    _, index = group_ids.unique(return_inverse=True)
    n_groups = int(index.max()) + 1 if len(index) else 0
    height = torch.where(eligible, peak_entropy, -torch.inf)
    top = torch.full((n_groups,), -torch.inf, device=height.device).scatter_reduce(0, index, height, "amax")
    rows = torch.arange(len(height), device=height.device)
    candidates = torch.where(eligible & (height == top[index]), rows, len(rows))
    winner = torch.full((n_groups,), len(rows), device=height.device).scatter_reduce(0, index, candidates, "amin")
    return eligible & (winner[index] == rows)


def lowest_of_group(peak_entropy: Tensor, eligible: Tensor, group_ids: Tensor) -> Tensor:
    """`per_group=lowest`: for each group the eligible rollout with the lowest peak, the earliest on ties (the choice
    of a rollout by low entropy is ExGRPO's, arXiv 2510.02245)."""
    return top_of_group(-peak_entropy, eligible, group_ids)
