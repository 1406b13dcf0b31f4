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
    """The estimator k1 of the KL divergence, -log r, elementwise. ``log_ratio``: reference log-prob minus log-prob."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """The estimator k2 of the KL divergence, (log r)^2 / 2, elementwise. ``log_ratio`` as in `k1`."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """The estimator k3 of the KL divergence, r - 1 - log r, elementwise, with log r limited to 20. ``log_ratio`` as in
    `k1`."""
    return torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio
