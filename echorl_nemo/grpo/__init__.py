"""The RL objective: advantages, policy losses, KL, sampling filters. Imports torch alone; every function is pure."""

from echorl_nemo.grpo.advantages import group_advantages
from echorl_nemo.grpo.config import AlgoConfig
from echorl_nemo.grpo.kl import kl_estimate
from echorl_nemo.grpo.loss import LossInputs, LossOutputs, StepTotals, policy_loss
from echorl_nemo.grpo.sampling import all_success_groups, counted_rollouts, effective_groups, overlong_penalty

__all__ = [
    "AlgoConfig",
    "LossInputs",
    "LossOutputs",
    "StepTotals",
    "all_success_groups",
    "counted_rollouts",
    "effective_groups",
    "group_advantages",
    "kl_estimate",
    "overlong_penalty",
    "policy_loss",
]
