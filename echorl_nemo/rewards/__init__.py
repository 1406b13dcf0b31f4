"""Verifiers: (response, reference answer) to a reward, 1.0 for a verified success."""

from collections.abc import Callable

from echorl_nemo.errors import UserError
from echorl_nemo.rewards.exact import exact_line
from echorl_nemo.rewards.math import math_equal

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {"exact_line": exact_line, "math": math_equal}


def reward_by_name(name: str) -> Reward:
    """Raises UserError for a name that is not known."""
    if name not in REWARDS:
        raise UserError(f"data.reward={name!r} is not known; use one of {', '.join(REWARDS)}")
    return REWARDS[name]


__all__ = ["Reward", "exact_line", "math_equal", "reward_by_name"]
