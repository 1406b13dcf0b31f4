"""The clip loss: NLL of the EchoClips."""

import torch
from torch import Tensor


def clip_loss(logprobs: Tensor, clip_mask: Tensor, denominator: float | Tensor) -> Tensor:
    """-(1/Z) times the sum over clip tokens of log pi, a scalar in nats.

    ``logprobs`` [N, S] of one micro-batch; ``clip_mask`` [N, S] bool; ``denominator`` is Z, counted by
    `clip_denominator` over the WHOLE optimizer step (all micro-batches, data- and context-parallel ranks), so that
    the micro-batches' losses add up to it. Without a clip token the loss is 0 and its gradient exactly 0.
    """
    total = torch.where(clip_mask, logprobs, 0.0).sum()
    return -total / torch.as_tensor(denominator, dtype=total.dtype, device=total.device).clamp(min=1.0)


def clip_denominator(clip_mask: Tensor, response_mask: Tensor, normalizer: str) -> Tensor:
    """This rank's share of Z, a scalar float64 count. The caller sums it over data- and context-parallel ranks.

    ``normalizer``: `clip_tokens`, `response_tokens` (of every rollout, with a clip or not) or `clips` (rollouts with
    a clip; exact only if rows are not split over context-parallel ranks).
    """
    match normalizer:
        case "clip_tokens":
            return clip_mask.sum().double()
        case "response_tokens":
            return response_mask.sum().double()
        case "clips":
            return clip_mask.any(dim=1).sum().double()
        case _:
            raise ValueError(
                f"echorl.normalizer={normalizer!r} is not known; use one of clip_tokens, response_tokens, clips"
            )
