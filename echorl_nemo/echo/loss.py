"""The clip loss: NLL of the EchoClips."""

import torch
from torch import Tensor

from echorl_nemo.echo.config import NORMALIZERS


def clip_loss(logprobs: Tensor, clip_mask: Tensor, denominator: float | Tensor) -> Tensor:
    """-(1/Z) times the sum over clip tokens of log pi, a scalar in nats.

    ``logprobs`` [N, S] of one micro-batch; ``clip_mask`` [N, S] bool; ``denominator`` is Z, counted by
    `clip_denominator` over the WHOLE optimizer step (all micro-batches, data- and context-parallel ranks), so that
    the micro-batches' losses add up to it. Without a clip token the loss is 0 and its gradient exactly 0.
    """
    total = torch.where(clip_mask, logprobs, 0.0).sum()
    return -total / torch.as_tensor(denominator, dtype=total.dtype, device=total.device).clamp(min=1.0)


def clip_denominator(clip_mask: Tensor, response_mask: Tensor, normalizer: str) -> Tensor:
    """This rank's share of Z, the denominator of the clip loss: a scalar float64 count. The caller sums it over data-
    and context-parallel ranks; `clip_loss` treats 0 as 1.

    ``normalizer``: `clip_tokens`, `response_tokens` (of every rollout, with a clip or not) or `clips` (rollouts with a
    clip; exact only if rows are not split over context-parallel ranks).
    """
    count: Tensor = NORMALIZERS.load(normalizer)(clip_mask, response_mask)
    return count.double()


def count_clip_tokens(clip_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Normalizer `clip_tokens`: number of clip tokens."""
    return clip_mask.sum()


def count_response_tokens(clip_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Normalizer `response_tokens`: number of response tokens of all rollouts."""
    return response_mask.sum()


def count_clips(clip_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Normalizer `clips`: number of rollouts with a clip."""
    return clip_mask.any(dim=1).sum()
