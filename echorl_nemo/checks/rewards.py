"""Checks of rewards against the estimator that compares them."""

from echorl_nemo.grpo.config import SUCCESS_ESTIMATORS, SUCCESS_ESTIMATORS_NOTE
from echorl_nemo.schema import RunConfig


def reward_problems(config: RunConfig) -> list[str]:
    """A problem if rewards are shaped by further verifiers that the estimator does not allow."""
    if config.algo.estimator not in SUCCESS_ESTIMATORS or not config.data.extra_rewards:
        return []
    names = ", ".join(extra.name for extra in config.data.extra_rewards)
    return [f"data.extra_rewards={names} with algo.estimator={config.algo.estimator}: {SUCCESS_ESTIMATORS_NOTE}"]
