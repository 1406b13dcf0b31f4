"""KL to the reference policy, estimated from the sampled tokens."""

import torch
from torch import Tensor

from echorl_nemo.grpo.config import KL_ESTIMATORS


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: str) -> Tensor:
    """The estimate of KL(pi || pi_ref) at each token, nats, of the arguments' shape; Schulman, "Approximating KL
    divergence" (2020). With r = pi_ref / pi: `k1` -log r, `k2` (log r)^2 / 2, `k3` r - 1 - log r."""
    log_ratio = reference_logprobs - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio
        case _:
            raise ValueError(f"algo.kl_estimator={estimator!r} is not known; use one of {', '.join(KL_ESTIMATORS)}")
