"""The RL objective: advantages and policy losses. Imports torch alone; every function is pure."""

from echorl_nemo.grpo.advantages import group_advantages
from echorl_nemo.grpo.config import AlgoConfig
from echorl_nemo.grpo.loss import LossInputs, LossOutputs, StepTotals, policy_loss

__all__ = ["AlgoConfig", "LossInputs", "LossOutputs", "StepTotals", "group_advantages", "policy_loss"]
