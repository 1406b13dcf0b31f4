"""KL to the reference policy, estimated from the sampled tokens.

Source: Schulman, "Approximating KL divergence" (2020). With r = pi_ref / pi, ``log_ratio`` is log r.
"""

import torch
from torch import Tensor

from echorl_nemo.grpo.config import KL_ESTIMATORS


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: str) -> Tensor:
    """The estimate of KL(pi || pi_ref) at each token, nats, of the arguments' shape, by `algo.kl_estimator`."""
    estimate: Tensor = KL_ESTIMATORS.load(estimator)(reference_logprobs - logprobs)
    return estimate


def k1(log_ratio: Tensor) -> Tensor:
    """-log r."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """(log r)^2 / 2."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r."""
    return torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio
