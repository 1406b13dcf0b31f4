"""Terms that keep the policy where it has mastered a prompt, by `algo.anchor`.

Shapes: N rollouts of a micro-batch, S positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echorl_nemo.grpo.config import AlgoConfig
from echorl_nemo.grpo.kl import k3

if TYPE_CHECKING:
    from echorl_nemo.grpo.loss import LossInputs


def none(inputs: "LossInputs", config: AlgoConfig) -> Tensor:
    """`anchor=none`: 0."""
    return torch.zeros((), dtype=inputs.logprobs.dtype, device=inputs.logprobs.device)


def mcpo(inputs: "LossInputs", config: AlgoConfig) -> Tensor:
    """`anchor=mcpo`: the hinge-KL of MCPO (arXiv 2604.16972, equations 7 to 11) to the policy that the step starts
    with, over the rollouts of all-correct groups: mean over tokens, then over rollouts. 0 within `anchor_budget` of the
    old log-prob, k3 less its value at the budget beyond."""
    if inputs.mastered is None:
        raise ValueError("algo.anchor=mcpo needs the rollouts of all-correct groups; give LossInputs.mastered")
    mask = inputs.response_mask & inputs.mastered[:, None]
    drift = torch.where(mask, inputs.logprobs - inputs.old_logprobs, 0.0).clamp(-20.0, 20.0)
    budget = torch.full_like(drift, config.anchor_budget)
    penalty = torch.where(drift.abs() > budget, k3(drift) - k3(torch.copysign(budget, drift.detach())), 0.0)
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (penalty / lengths).sum() / max(1.0, inputs.totals.mastered)
