"""The clip loss: weighted NLL of the supervised tokens.

Shapes: N rollouts, S positions.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.echo.config import NORMALIZERS, TOKEN_WEIGHTS


def clip_loss(
    logprobs: Tensor, clip_weight: Tensor, denominator: float | Tensor, *, token_weight: str = "one"
) -> Tensor:
    """-(1/Z) times the sum over tokens of w log pi, a scalar in nats.

    ``logprobs`` [N, S] of one micro-batch; ``clip_weight`` [N, S] float32 >= 0, w; ``denominator`` is Z, counted by
    `clip_denominator` over the WHOLE optimizer step (all micro-batches, data- and context-parallel ranks), so that
    the micro-batches' losses add up to it. ``token_weight``: `echorl.token_weight`. Without a weight above 0 the loss
    is 0 and its gradient exactly 0.
    """
    inside = torch.where(clip_weight > 0, logprobs, 0.0)
    total = (clip_weight * TOKEN_WEIGHTS.load(token_weight)(inside) * inside).sum()
    divisor = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    return -total / torch.where(divisor > 0, divisor, 1.0)


def one_weight(logprobs: Tensor) -> Tensor:
    """Token weight `one`: no further factor. ``logprobs`` [N, S] nats."""
    return torch.ones((), dtype=logprobs.dtype, device=logprobs.device)


def probability_weight(logprobs: Tensor) -> Tensor:
    """Token weight `probability`: pi of the token, without a gradient (DFT, arXiv 2508.05629).
    ``logprobs`` [N, S] nats."""
    return logprobs.detach().exp()


def clip_denominator(
    clip_weight: Tensor,
    response_mask: Tensor,
    normalizer: str,
    *,
    constant: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's share of Z, the denominator of the clip loss: a scalar float64. The caller sums it over data- and
    context-parallel ranks; `clip_loss` treats 0 as 1.

    ``clip_weight`` [N, S] and ``response_mask`` [N, S] bool of this rank; ``normalizer``: `echorl.normalizer`;
    ``constant``: this rank's share of the Z that the configuration fixes, prompts x `echorl.constant_length`;
    ``group``: the context-parallel ranks that share a row.

    Raises ValueError if the normalizer is `constant` and no ``constant`` is given.
    """
    share: Tensor = NORMALIZERS.load(normalizer)(clip_weight, response_mask, constant, group)
    return share.double()


Group = dist.ProcessGroup | None


def count_clip_mean(clip_weight: Tensor, response_mask: Tensor, constant: float, group: Group) -> Tensor:
    """Normalizer `clip_mean`: number of clips. `select_clips` has divided the weights of each clip by their sum."""
    has_clip = (clip_weight > 0).any(dim=1).double()
    if group is None:
        return has_clip.sum()
    dist.all_reduce(has_clip, op=dist.ReduceOp.MAX, group=group)
    return has_clip.sum() / group.size()


def count_clip_tokens(clip_weight: Tensor, response_mask: Tensor, constant: float, group: Group) -> Tensor:
    """Normalizer `clip_tokens`: sum of the weights, the number of clip tokens where every weight is 1."""
    return clip_weight.sum(dtype=torch.float64)


def count_response_tokens(clip_weight: Tensor, response_mask: Tensor, constant: float, group: Group) -> Tensor:
    """Normalizer `response_tokens`: number of response tokens of all rollouts."""
    return response_mask.sum()


def count_constant(clip_weight: Tensor, response_mask: Tensor, constant: float, group: Group) -> Tensor:
    """Normalizer `constant`: what the configuration fixes."""
    if not constant > 0:
        raise ValueError(
            f"constant={constant}: echorl.normalizer=constant divides by it; give prompts x echorl.constant_length"
        )
    return torch.tensor(constant, dtype=torch.float64, device=clip_weight.device)
