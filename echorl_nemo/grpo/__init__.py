"""The RL objective: advantages, policy losses, KL, sampling filters. Every function is pure; torch is the only
dependency.

The functions are imported at their first use, so that reading a configuration does not import torch.
"""

from typing import TYPE_CHECKING, Any

from echorl_nemo.grpo.config import AlgoConfig

if TYPE_CHECKING:
    from echorl_nemo.grpo.advantages import group_advantages
    from echorl_nemo.grpo.kl import kl_estimate
    from echorl_nemo.grpo.loss import LossInputs, LossOutputs, StepTotals, policy_loss
    from echorl_nemo.grpo.sampling import all_success_groups, counted_rollouts, effective_groups, overlong_penalty
    from echorl_nemo.grpo.token_advantages import step_advantages

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
    "step_advantages",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from echorl_nemo.grpo import advantages, kl, loss, sampling, token_advantages

    modules = (advantages, kl, loss, sampling, token_advantages)
    return next(getattr(module, name) for module in modules if hasattr(module, name))
