"""What groups with equal rewards are given in place of advantages of 0, by `algo.degenerate`.

Each is a function of (`DegenerateInputs`, config) that returns the advantages of all rollouts, [N], or of the tokens of
this rank's, [n, S]. Whether
such a group is right or wrong is decided by its rollouts' success and not by the reward, which may be shaped: by a
format, a length or a KL.

Shapes: N rollouts of a step, n of them on this rank, S positions.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from echorl_nemo.grpo.advantages import equal_rewards
from echorl_nemo.grpo.config import AlgoConfig

FIRST_COLLAPSE_THRESHOLD = 0.5
"""AVSPO, section 4.2: the share of groups with equal rewards above which virtual rewards are used, at first."""
COLLAPSE_LEARNING_RATE = 0.01
"""AVSPO, equation 10: eta."""
VIRTUAL_SENSITIVITY = 0.5
"""AVSPO, equation 8: alpha."""
VIRTUAL_ANCHOR = 0.1
"""AVSPO, equation 9: the highest virtual reward of a group without success."""


@dataclass(frozen=True)
class DegenerateInputs:
    """What the treatment of groups with equal rewards may depend on."""

    advantages: Tensor
    """[N]: by `algo.estimator`; 0 in groups with equal rewards."""
    rewards: Tensor
    """[N]: from which the advantages are estimated."""
    group_ids: Tensor
    """[N]: the same for the rollouts of one prompt."""
    correct: Tensor
    """[N] bool: rewarded, before any shaping, with at least ``success_reward``."""
    success_reward: float
    """Reward of a success."""
    entropies: Tensor | None
    """[n, S] nats, of the policy that the step starts with; None if they are not known."""
    response_mask: Tensor
    """[n, S] bool."""
    collapse_threshold: float = FIRST_COLLAPSE_THRESHOLD
    """The share of groups with equal rewards above which AVSPO acts."""
    rows: slice = field(default_factory=lambda: slice(None))
    """Rows of this rank among the N."""

    @property
    def all_right(self) -> Tensor:
        """[N] bool: the rewards of the rollout's group are equal, and all its rollouts are successes."""
        return self._equal & equal_rewards(self.correct.float(), self.group_ids) & self.correct

    @property
    def all_wrong(self) -> Tensor:
        """[N] bool: the rewards of the rollout's group are equal, and none of its rollouts is a success."""
        return self._equal & equal_rewards(self.correct.float(), self.group_ids) & ~self.correct

    @property
    def _equal(self) -> Tensor:
        return equal_rewards(self.rewards, self.group_ids)


def zero(inputs: DegenerateInputs, config: AlgoConfig) -> Tensor:
    """`degenerate=zero`: the estimator's advantages, 0 where the rewards of a group are equal."""
    return inputs.advantages


def zvp(inputs: DegenerateInputs, config: AlgoConfig) -> Tensor:
    """`degenerate=zvp`, [n, S]: alpha H for a token of an all-correct group, -alpha (max H - H) of an all-wrong one,
    with the maximum over the response (RL-ZVP, arXiv 2509.21880, equation 5)."""
    if inputs.entropies is None:
        raise ValueError("algo.degenerate=zvp needs the policy's entropies, and this run has none; use zero")
    entropies, mask = inputs.entropies.detach(), inputs.response_mask
    # one more column, so that a rank without rollouts has one to look at
    highest = torch.nn.functional.pad(torch.where(mask, entropies, -torch.inf), (0, 1), value=-torch.inf)
    highest = highest.amax(dim=1, keepdim=True)
    right, wrong = inputs.all_right[inputs.rows, None], inputs.all_wrong[inputs.rows, None]
    shaped = torch.where(right, entropies, entropies - highest) * config.zvp_alpha
    return torch.where(mask, torch.where(right | wrong, shaped, inputs.advantages[inputs.rows, None]), 0.0)


def ngrpo(inputs: DegenerateInputs, config: AlgoConfig) -> Tensor:
    """`degenerate=ngrpo`: the reward of one virtual success joins every group; mean and population deviation are those
    of the G + 1 rewards, so that an all-wrong group is pushed away (NGRPO, arXiv 2509.18851).

    The virtual reward is the highest that a group can have: `success_reward`, or the group's own highest if that is
    more. An all-right group with equal rewards gets 0.
    """
    _, index, sizes = inputs.group_ids.unique(return_inverse=True, return_counts=True)
    rewards = inputs.rewards.double()
    # rounded as the rewards are, since .9 in float32 is not .9 in float64
    success = float(torch.tensor(inputs.success_reward, dtype=inputs.rewards.dtype))
    virtual = torch.full((len(sizes),), success, dtype=rewards.dtype, device=rewards.device)
    virtual.scatter_reduce_(0, index, rewards, "amax")

    def mean(values: Tensor, of_virtual: Tensor) -> Tensor:
        return (torch.zeros_like(virtual).scatter_add_(0, index, values) + of_virtual) / (sizes + 1)

    centre = mean(rewards, virtual)
    spread = mean((rewards - centre[index]).square(), (virtual - centre).square()).sqrt()
    return torch.where(inputs.all_right, 0.0, (rewards - centre[index]) / (spread[index] + 1e-6))


def avspo(inputs: DegenerateInputs, config: AlgoConfig) -> Tensor:
    """`degenerate=avspo`: virtual rewards join the groups with equal rewards if their share is above the threshold;
    mean and population deviation are those of real and virtual rewards (AVSPO, arXiv 2605.21125, equations 6 to 9).

    An all-right group counts as rewarded with 1, an all-wrong one with 0, as in the paper: those advantages do not
    depend on the size of the reward.
    """
    share = collapse_rate(inputs.rewards, inputs.group_ids)
    advantages = inputs.advantages.clone()
    if share <= inputs.collapse_threshold:
        return advantages
    all_right = inputs.all_right
    for group in inputs.group_ids[all_right | inputs.all_wrong].unique():
        member = inputs.group_ids == group
        size, reward = int(member.sum()), float(all_right[member][0])
        virtual = virtual_rewards(reward, max(1, min(size, math.ceil(size * share**VIRTUAL_SENSITIVITY))))
        pool = torch.tensor([reward] * size + virtual, dtype=torch.float64)
        advantages[member] = float((reward - pool.mean()) / (pool.std(correction=0) + 1e-8))
    return advantages


def virtual_rewards(reward: float, count: int) -> list[float]:
    """AVSPO, equation 9: ``count`` rewards below ``reward``, or a ladder above 0 where the group has no success."""
    if reward > 0:
        return [reward * (1 - k / (count + 1)) for k in range(1, count + 1)]
    return [VIRTUAL_ANCHOR * (count - k + 1) / count for k in range(1, count + 1)]


def collapse_rate(rewards: Tensor, group_ids: Tensor) -> float:
    """AVSPO, equation 6: the share of groups whose rewards are equal."""
    groups = len(group_ids.unique())
    return len(group_ids[equal_rewards(rewards, group_ids)].unique()) / groups if groups else 0.0


def next_collapse_threshold(threshold: float, rate: float, reward: float, earlier_reward: float | None) -> float:
    """AVSPO, equation 10: the threshold moves towards ``rate``, the share of groups with equal rewards, if the mean
    reward rises, and away from it if it falls."""
    if earlier_reward is None or reward == earlier_reward:
        return threshold
    return threshold + math.copysign(COLLAPSE_LEARNING_RATE, reward - earlier_reward) * (rate - threshold)
