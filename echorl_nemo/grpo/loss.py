"""Policy losses over rollouts.

A loss (`algo.loss`) is a function like `clipped_loss`, which gives the loss of each token; a user's own function has
the same form. An aggregation (`algo.aggregation`) gives the weight of each token.

Every denominator is a count over the whole optimizer step (all micro-batches and data-parallel ranks), which the caller
passes. So the losses and metrics of micro-batches add up to those of the step: no mean is taken of local means.

Shapes: N rollouts of a micro-batch, S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from echorl_nemo.grpo.config import AGGREGATIONS, ANCHORS, LOSSES, AlgoConfig
from echorl_nemo.grpo.demonstrations import expert_loss
from echorl_nemo.grpo.kl import kl_estimate
from echorl_nemo.grpo.mismatch import mismatch_weights, needs_mismatch_weights
from echorl_nemo.ops.results import tensor_of_shape

MAX_LOG_RATIO = 20.0
"""exp() of more would overflow to inf, and inf times an advantage of 0 is NaN."""


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole optimizer step."""

    rollouts: float
    """Rollouts that take part in the loss."""
    tokens: float
    """Response tokens of those rollouts."""
    response_tokens: float
    """Response tokens of all rollouts, over which the entropy is averaged."""
    mastered: float = 0.0
    """Rollouts of all-correct groups, over which the anchor is averaged."""


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
    counted: Tensor
    """[N] bool: the rollouts that take part in the loss (`grpo.sampling.counted_rollouts`)."""
    entropies: Tensor
    """[N, S] nats; carries a gradient if there is an entropy bonus."""
    totals: StepTotals
    rollout_logprobs: Tensor | None = None
    """[N, S] nats, of the rollout engine; needed by `tis_cap` and IcePop."""
    reference_logprobs: Tensor | None = None
    """[N, S] nats, of the reference policy; needed by a KL in the loss."""
    mastered: Tensor | None = None
    """[N] bool: the rollouts of all-correct groups; needed by an anchor."""
    expert: Tensor | None = None
    """[N] bool: the responses by an expert (`demonstrations=luffy`); None if there is none."""


@dataclass(frozen=True)
class LossOutputs:
    """A scalar loss, and metrics; both add up over the micro-batches and data-parallel ranks of the step."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(inputs: LossInputs, config: AlgoConfig) -> LossOutputs:
    """The policy loss: surrogate, plus `kl_coef` x KL, plus `anchor_coef` x anchor, minus `entropy_coef` x entropy, as
    `AlgoConfig` defines them.

    Metrics: `policy_loss`; `anchor_loss` (nats); `entropy` (nats), the mean over all response tokens; and means over
    the response tokens of the rollouts that take part in the loss: `ratio_clipped` (share of tokens whose loss the clip
    changed), `kl_old` and `kl_reference` (nats; k3 to the step's first policy, `kl_estimator` to the reference),
    `mismatch_dropped` (share of tokens that IcePop removed).
    """
    mask = inputs.response_mask & inputs.counted[:, None]
    weights = token_weights(mask, inputs.totals, config)
    log_ratio = torch.where(mask, inputs.logprobs - inputs.old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    token_loss, clipped = token_losses(log_ratio, inputs, config, mask)
    if inputs.expert is not None:
        shaped = expert_loss(torch.where(mask, inputs.logprobs, 0.0), _per_token(inputs.advantages), config.luffy_gamma)
        token_loss = torch.where(inputs.expert[:, None], shaped, token_loss)
        clipped = clipped & ~inputs.expert[:, None]
    dropped = torch.zeros_like(mask)
    if needs_mismatch_weights(config):
        if inputs.rollout_logprobs is None:
            raise ValueError(
                "algo.tis_cap, icepop_low and icepop_high need the rollouts' log-probs, and this rollout engine gave "
                "none; use null"
            )
        mismatch = mismatch_weights(inputs.old_logprobs, inputs.rollout_logprobs, config)
        token_loss, dropped = token_loss * mismatch, mask & (mismatch == 0)
    surrogate = (token_loss * weights).sum()
    loss = surrogate
    kl = torch.zeros_like(inputs.logprobs)
    if inputs.reference_logprobs is not None:
        kl = torch.where(
            mask, kl_estimate(inputs.logprobs, inputs.reference_logprobs, estimator=config.kl_estimator), 0.0
        )
        if config.kl_in == "loss":
            loss = loss + config.kl_coef * (kl * weights).sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (inputs.entropies * weights).sum()

    anchor = ANCHORS.load(config.anchor)(inputs, config)
    if config.anchor != "none":
        loss = loss + config.anchor_coef * anchor

    with torch.no_grad():
        per_token = inputs.response_mask / max(1.0, inputs.totals.response_tokens)
        per_counted = mask / max(1.0, inputs.totals.tokens)
        metrics = {
            "policy_loss": surrogate.detach(),
            "anchor_loss": anchor.detach(),
            "entropy": (inputs.entropies * per_token).sum(),
            "ratio_clipped": (clipped * per_counted).sum(),
            "kl_old": ((log_ratio.exp() - 1 - log_ratio) * per_counted).sum(),
            "kl_reference": (kl * per_counted).sum(),
            "mismatch_dropped": (dropped * per_counted).sum(),
        }
    return LossOutputs(loss, metrics)


TokenLoss = tuple[Tensor, Tensor]
"""Loss of each token, [N, S], and whether the clip changed it, [N, S] bool."""


def token_losses(log_ratio: Tensor, inputs: LossInputs, config: AlgoConfig, mask: Tensor) -> TokenLoss:
    """What the function of `algo.loss` returns; the arguments are those of `clipped_loss`. Raises ValueError if it does
    not return the two tensors."""
    source, returned = f"algo.loss={config.loss}", LOSSES.load(config.loss)(log_ratio, inputs, config, mask)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(
            f"{source} returned {type(returned).__name__}; return two tensors: losses, and what the clip changed"
        )
    losses, clipped = returned
    return tensor_of_shape(losses, mask.shape, source), tensor_of_shape(clipped, mask.shape, source)


def clipped_loss(log_ratio: Tensor, inputs: LossInputs, config: AlgoConfig, mask: Tensor) -> TokenLoss:
    """Loss `clipped`: the ratio of each token is clipped (arXiv 1707.06347, equation 7).

    ``log_ratio`` [N, S]: log-prob minus old log-prob; ``mask`` [N, S] bool: the tokens that take part in the loss.
    """
    ratio = log_ratio.exp()
    advantages = _per_token(inputs.advantages)
    unclipped, clipped = ratio * advantages, _bounded(ratio, config) * advantages
    return -torch.minimum(unclipped, clipped), mask & (clipped < unclipped)


def gspo_loss(log_ratio: Tensor, inputs: LossInputs, config: AlgoConfig, mask: Tensor) -> TokenLoss:
    """Loss `gspo`: one ratio for a response, the geometric mean of its tokens' (arXiv 2507.18071, equation 5)."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    of_response = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(log_ratio)
    return clipped_loss(of_response, inputs, config, mask)


def cispo_loss(log_ratio: Tensor, inputs: LossInputs, config: AlgoConfig, mask: Tensor) -> TokenLoss:
    """Loss `cispo`: the clipped ratio is a constant weight of the log-prob (arXiv 2506.13585, equation 4)."""
    ratio = log_ratio.exp()
    bounded = _bounded(ratio, config)
    logprobs = torch.where(mask, inputs.logprobs, 0.0)
    return -bounded.detach() * _per_token(inputs.advantages) * logprobs, mask & (bounded != ratio)


def _bounded(ratio: Tensor, config: AlgoConfig) -> Tensor:
    return ratio.clamp(1 - config.clip_low, 1 + config.clip_high)


def _per_token(advantages: Tensor) -> Tensor:
    """Advantages [N, 1] or [N, S]."""
    return advantages if advantages.dim() == 2 else advantages[:, None]


def token_weights(mask: Tensor, totals: StepTotals, config: AlgoConfig) -> Tensor:
    """The weight of each token in the loss, [N, S] float32; 0 outside ``mask``, the tokens that take part."""
    weights: Tensor = AGGREGATIONS.load(config.aggregation)(mask.float(), totals, config)
    return weights


def rollout_mean(counts: Tensor, totals: StepTotals, config: AlgoConfig) -> Tensor:
    """Aggregation `rollout_mean`: mean over each response, then over rollouts. ``counts`` [N, S]: the mask as float."""
    lengths = counts.sum(dim=1, keepdim=True).clamp(min=1)
    return counts / lengths / max(1.0, totals.rollouts)


def token_mean(counts: Tensor, totals: StepTotals, config: AlgoConfig) -> Tensor:
    """Aggregation `token_mean`: mean over all tokens. ``counts`` [N, S]: the mask as float."""
    return counts / max(1.0, totals.tokens)


def constant(counts: Tensor, totals: StepTotals, config: AlgoConfig) -> Tensor:
    """Aggregation `constant`: sum divided by rollouts x `constant_length`. ``counts`` [N, S]: the mask as float."""
    return counts / (max(1.0, totals.rollouts) * config.constant_length)
