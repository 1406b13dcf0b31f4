"""Token weights that correct the mismatch of rollout engine and policy: the same model gives slightly different
log-probs in another engine.

Shapes: N rollouts, S positions.
"""

import torch
from torch import Tensor

from echorl_nemo.grpo.config import AlgoConfig


def mismatch_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, config: AlgoConfig) -> Tensor:
    """A factor of each token's loss, [N, S] float32, without a gradient.

    Truncated importance sampling: min(pi_old / pi_rollout, `tis_cap`). IcePop: 0 where pi_old / pi_rollout is outside
    [`icepop_low`, `icepop_high`]. 1 where both are off.
    """
    ratio = (old_logprobs - rollout_logprobs).detach().clamp(-20.0, 20.0).exp()
    weights = ratio.clamp(max=config.tis_cap) if config.tis_cap is not None else torch.ones_like(ratio)
    if config.icepop_low is not None:
        weights = weights * (ratio >= config.icepop_low)
    if config.icepop_high is not None:
        weights = weights * (ratio <= config.icepop_high)
    return weights


def needs_mismatch_weights(config: AlgoConfig) -> bool:
    """Whether ``config`` asks for `mismatch_weights`."""
    return any(value is not None for value in (config.tis_cap, config.icepop_low, config.icepop_high))
