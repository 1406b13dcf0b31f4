"""Policy losses over rollouts.

Every denominator is a count over the whole optimizer step (all micro-batches and data-parallel ranks), given by the
caller. So the losses and metrics of micro-batches ADD UP to those of the step: no mean is ever taken of local means.

Shapes: N rollouts of a micro-batch, S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from echorl_nemo.grpo.config import AlgoConfig

MAX_LOG_RATIO = 20.0
"""exp() of more would overflow to inf, and inf times an advantage of 0 is NaN."""


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole optimizer step."""

    rollouts: float
    tokens: float
    """Response tokens."""


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch of rollouts; all [N, S] tensors are 0 or False outside the response."""

    logprobs: Tensor
    """[N, S] nats, of the policy being trained; carries the gradient."""
    old_logprobs: Tensor
    """[N, S] nats, of the policy that the step started with."""
    advantages: Tensor
    """[N] or [N, S]."""
    response_mask: Tensor
    """[N, S] bool."""
    entropies: Tensor
    """[N, S] nats; carries a gradient if there is an entropy bonus."""
    totals: StepTotals


@dataclass(frozen=True)
class LossOutputs:
    """A scalar loss, and metrics; both add up over the micro-batches and data-parallel ranks of the step."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(inputs: LossInputs, config: AlgoConfig) -> LossOutputs:
    """Clipped surrogate loss less the entropy bonus (arXiv 1707.06347, equation 7).

    Metrics: `policy_loss`, `entropy` (mean over tokens, nats), `ratio_clipped` (share of tokens whose gradient the
    clip removed), `kl_old` (mean over tokens of r - 1 - log r, nats; arXiv 2402.03300, equation 4).
    """
    mask = inputs.response_mask
    advantages = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages[:, None]
    log_ratio = torch.where(mask, inputs.logprobs - inputs.old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    token_loss = -torch.minimum(unclipped, clipped)

    weights = token_weights(mask, inputs.totals, config)
    surrogate = (token_loss * weights).sum()
    loss = surrogate
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (inputs.entropies * weights).sum()

    per_token = mask / max(1.0, inputs.totals.tokens)
    with torch.no_grad():
        metrics = {
            "policy_loss": surrogate.detach(),
            "entropy": (inputs.entropies * per_token).sum(),
            "ratio_clipped": ((clipped < unclipped) * per_token).sum(),
            "kl_old": ((ratio - 1 - log_ratio) * per_token).sum(),
        }
    return LossOutputs(loss, metrics)


def token_weights(response_mask: Tensor, totals: StepTotals, config: AlgoConfig) -> Tensor:
    """What each token counts in the loss, [N, S] float32; 0 outside the response."""
    mask = response_mask.float()
    match config.aggregation:
        case "rollout_mean":
            lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
            return mask / lengths / max(1.0, totals.rollouts)
        case "token_mean":
            return mask / max(1.0, totals.tokens)
        case _:
            return mask / (max(1.0, totals.rollouts) * config.constant_length)
