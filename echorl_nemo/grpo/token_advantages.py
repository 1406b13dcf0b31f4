"""The advantages of a training step: the estimator's, what groups with equal rewards are given, and the tokens chosen.

Shapes: N rollouts of a step, n of them on this rank, S positions.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.grpo.advantages import group_advantages
from echorl_nemo.grpo.config import DEGENERATE, POLICY_TOKENS, AlgoConfig
from echorl_nemo.grpo.degenerate import DegenerateInputs
from echorl_nemo.ops.entropy_threshold import entropy_threshold

Group = dist.ProcessGroup | None


def step_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    config: AlgoConfig,
    *,
    correct: Tensor,
    success_reward: float,
    entropies: Tensor | None,
    response_mask: Tensor,
    collapse_threshold: float,
    rows: slice = slice(None),
    data_group: Group = None,
) -> Tensor:
    """The advantages of this rank's rollouts as ``config`` defines them, [n] or, where they differ by token, [n, S]
    float32: `estimator`, then `degenerate`, then `policy_tokens`. The arguments are those of `DegenerateInputs`;
    ``data_group``: the ranks that hold the other rollouts."""
    inputs = DegenerateInputs(
        group_advantages(rewards, group_ids, estimator=config.estimator), rewards, group_ids, correct, success_reward,
        entropies, response_mask, collapse_threshold, rows,
    )  # fmt: skip
    advantages: Tensor = DEGENERATE.load(config.degenerate)(inputs, config)
    if advantages.dim() == 1:
        advantages = advantages[rows]
    advantages = POLICY_TOKENS.load(config.policy_tokens)(advantages, entropies, response_mask, config, data_group)
    return advantages.float()


def all_tokens(
    advantages: Tensor, entropies: Tensor | None, response_mask: Tensor, config: AlgoConfig, data_group: Group
) -> Tensor:
    """`policy_tokens=all`: the advantages as they are, [n] or [n, S]."""
    return advantages


def top_entropy_tokens(
    advantages: Tensor, entropies: Tensor | None, response_mask: Tensor, config: AlgoConfig, data_group: Group
) -> Tensor:
    """`policy_tokens=top_entropy`: [n, S], 0 for tokens whose entropy is below the quantile of the step's response
    tokens (arXiv 2506.01939, equation 5)."""
    if entropies is None:
        raise ValueError("algo.policy_tokens=top_entropy needs the policy's entropies, and this run has none; use all")
    groups = [] if data_group is None else [data_group]
    least = entropy_threshold(entropies, response_mask, config.policy_token_share, groups=groups)
    chosen = response_mask & (entropies.float().clamp(min=0) >= (torch.inf if least is None else least))
    return torch.where(chosen, advantages if advantages.dim() == 2 else advantages[:, None], 0.0)
