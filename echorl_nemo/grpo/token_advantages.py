"""The advantages of a training step: the estimator's, what groups with equal rewards are given, and the tokens chosen.

Shapes: N rollouts, S positions.
"""

import torch
from torch import Tensor

from echorl_nemo.grpo.advantages import group_advantages
from echorl_nemo.grpo.config import DEGENERATE, POLICY_TOKENS, AlgoConfig
from echorl_nemo.grpo.degenerate import DegenerateInputs
from echorl_nemo.ops.entropy_threshold import entropy_threshold


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
) -> Tensor:
    """The advantages of the rollouts of a step as ``config`` defines them, [N] or, where they differ by token, [N, S]
    float32: `estimator`, then `degenerate`, then `policy_tokens`. The arguments are those of `DegenerateInputs`."""
    inputs = DegenerateInputs(
        group_advantages(rewards, group_ids, estimator=config.estimator), rewards, group_ids, correct, success_reward,
        entropies, response_mask, collapse_threshold,
    )  # fmt: skip
    advantages: Tensor = DEGENERATE.load(config.degenerate)(inputs, config)
    advantages = POLICY_TOKENS.load(config.policy_tokens)(advantages, entropies, response_mask, config)
    return advantages.float()


def all_tokens(advantages: Tensor, entropies: Tensor | None, response_mask: Tensor, config: AlgoConfig) -> Tensor:
    """`policy_tokens=all`: the advantages as they are, [N] or [N, S]."""
    return advantages


def top_entropy_tokens(
    advantages: Tensor, entropies: Tensor | None, response_mask: Tensor, config: AlgoConfig
) -> Tensor:
    """`policy_tokens=top_entropy`: [N, S], 0 for tokens whose entropy is below the quantile of the step's response
    tokens (arXiv 2506.01939, equation 5)."""
    if entropies is None:
        raise ValueError("algo.policy_tokens=top_entropy needs the policy's entropies, and this run has none; use all")
    least = entropy_threshold(entropies, response_mask, config.policy_token_share)
    chosen = response_mask & (entropies.float().clamp(min=0) >= (torch.inf if least is None else least))
    return torch.where(chosen, advantages if advantages.dim() == 2 else advantages[:, None], 0.0)
