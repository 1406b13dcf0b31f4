"""The settings of the RL objective."""

from dataclasses import dataclass

ESTIMATORS = ("grpo", "dr_grpo")
AGGREGATIONS = ("rollout_mean", "token_mean", "constant")


@dataclass(kw_only=True)
class AlgoConfig:
    """Advantages and policy loss. A method is a choice of these values: see `conf/algo/`."""

    estimator: str = "grpo"
    """Advantage of a rollout within its group: `grpo`, reward less the group's mean, over its standard deviation
    (arXiv 2402.03300, section 4.1.2); `dr_grpo`, without the division (arXiv 2503.20783, section 3.2)."""

    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""

    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high; more than clip_low is DAPO's clip-higher
    (arXiv 2503.14476, section 3.1)."""

    aggregation: str = "rollout_mean"
    """How token losses make the loss, always over the whole optimizer step: `rollout_mean`, mean over each
    response, then over rollouts (GRPO); `token_mean`, mean over all response tokens (DAPO, section 3.3);
    `constant`, sum over rollouts x `constant_length` (Dr. GRPO, section 3.1)."""

    constant_length: int = 1024
    """Tokens that stand for a response's length with aggregation `constant`; the generation budget by custom."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus, aggregated like the policy loss; 1e-3 in the EchoRL paper's script."""

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"algo.estimator={self.estimator!r} is not known; use one of {', '.join(ESTIMATORS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"algo.aggregation={self.aggregation!r} is not known; use one of {', '.join(AGGREGATIONS)}"
            )
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"algo.clip_low={self.clip_low} must lie in [0, 1)")
        if self.clip_high < 0:
            raise ValueError(f"algo.clip_high={self.clip_high} is negative; use 0 or more")
        if self.constant_length < 1:
            raise ValueError(f"algo.constant_length={self.constant_length} must be at least 1 token")
