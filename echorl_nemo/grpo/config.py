"""The settings of the RL objective."""

from dataclasses import dataclass

from echorl_nemo.ops.ranges import check_fields, number, word

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus")
GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo")
"""Those that compare the rollouts of a group."""
LOSSES = ("clipped", "gspo", "cispo")
AGGREGATIONS = ("rollout_mean", "token_mean", "constant")
DENOMINATORS = ("live", "all")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")
IMPORTANCES = ("policy", "rollout")


@dataclass(kw_only=True)
class AlgoConfig:
    """Advantages and policy loss. A method is a choice of these values: see `conf/algo/`."""

    estimator: str = word("grpo", ESTIMATORS)
    """Advantage of a rollout: `grpo`, reward less its group's mean, over the group's standard deviation
    (arXiv 2402.03300, section 4.1.2); `dr_grpo`, without the division (2503.20783, section 3.2); `rloo`, reward less
    the mean of the group's others (2402.14740, section 3.2); `reinforce_plus_plus`, reward less the whole batch's mean,
    over its standard deviation (2501.03262, section 3)."""

    loss: str = word("clipped", LOSSES)
    """`clipped`, the ratio of each token clipped (1707.06347, equation 7); `gspo`, one ratio for a response, the
    geometric mean of its tokens' (2507.18071, equation 5); `cispo`, the clipped ratio as a constant weight of the
    log-prob, so that every token keeps its gradient (2506.13585, equation 4)."""

    clip_low: float = number(0.2, "[0, 1]", "1 is no lower bound")
    """The probability ratio is clipped below at 1 - clip_low; 1 is no lower bound."""

    clip_high: float = number(0.2, "[0, 1000000]")
    """The probability ratio is clipped above at 1 + clip_high; more than clip_low is DAPO's clip-higher
    (2503.14476, section 3.1)."""

    aggregation: str = word("rollout_mean", AGGREGATIONS)
    """How token losses make the loss, always over the whole optimizer step: `rollout_mean`, mean over each
    response, then over rollouts (GRPO); `token_mean`, mean over all response tokens (DAPO, section 3.3);
    `constant`, sum over rollouts x `constant_length` (Dr. GRPO, section 3.1)."""

    denominator: str = word("live", DENOMINATORS)
    """Which rollouts and tokens `aggregation` counts: `live`, those of groups with any advantage, so that dead groups
    do not dilute the others (and get neither KL nor entropy bonus); `all`, as in the papers' formulas."""

    constant_length: int = number(1024, "[1, 1000000000]")
    """Tokens that stand for a response's length with aggregation `constant`; the generation budget by custom."""

    entropy_coef: float = number(0.0, "[0, 1000000]")
    """Weight of the entropy bonus, aggregated like the policy loss; 1e-3 in the EchoRL paper's script."""

    kl_coef: float = number(0.0, "[0, 1000000]")
    """beta, weight of the KL to the reference policy (the model that the run started from); 0 keeps no reference."""

    kl_estimator: str = word("k3", KL_ESTIMATORS)
    """Of the KL from one sample, with r = pi_ref / pi: `k1`, -log r; `k2`, (log r)^2 / 2; `k3`, r - 1 - log r."""

    kl_in: str = word("loss", KL_PLACES)
    """`loss`, a term beside the policy loss; `reward`, its sum over the response taken off the reward."""

    importance: str = word("policy", IMPORTANCES)
    """Whose log-probs the probability ratio is taken to: `policy`, those of the scoring pass before the step's first
    update; `rollout`, the rollout engine's own, so that the scoring pass is skipped. Then the ratio holds the mismatch
    of engine and policy too, and the clip bounds it."""

    tis_cap: float | None = number(None, "(0, 1000000]", "null is off")
    """Truncated importance sampling: a token's loss is weighted by pi_old / pi_rollout, at most this; 2 is usual. Null
    is off. It mends the mismatch of rollout engine and policy."""

    icepop_low: float | None = number(None, "(0, 1000000]", "null is off")
    """IcePop: a token whose pi_old / pi_rollout is below this counts nothing; 0.5 is usual. Null is off."""

    icepop_high: float | None = number(None, "(0, 1000000]", "null is off")
    """IcePop: a token whose pi_old / pi_rollout is above this counts nothing; 5 is usual. Null is off."""

    dynamic_sampling: bool = False
    """Ask further prompts until `trainer.prompts_per_step` groups have different rewards (DAPO, section 3.2). Groups
    without success are dropped; all-success groups are kept for their EchoClips and not counted."""

    dynamic_sampling_rounds: int = number(4, "[1, 1000000]")
    """At most so many rounds of `trainer.prompts_per_step` prompts; then the step trains on the groups it has."""

    overlong_buffer: int = number(0, "[0, 10000000]", "0 is off")
    """Soft punishment of long responses (DAPO, section 3.4): over the last so many tokens of the budget the reward
    falls linearly by `overlong_penalty`; 0 is off. Success is decided before."""

    overlong_penalty: float = number(1.0, "[0, 1000000]")
    """What a truncated response loses, with `overlong_buffer`."""

    overlong_filter: bool = False
    """Truncated rollouts take no part in the policy loss (DAPO, section 3.4)."""

    def __post_init__(self) -> None:
        problems = [
            f"algo.{name}={getattr(self, name)} corrects the ratio of policy and rollout engine, which "
            "algo.importance=rollout does not take; use null, or importance=policy"
            for name in ("tis_cap", "icepop_low", "icepop_high")
            if getattr(self, name) is not None and self.importance == "rollout"
        ]
        if self.icepop_low is not None and self.icepop_high is not None and self.icepop_low > self.icepop_high:
            problems.append(
                f"algo.icepop_low={self.icepop_low} is above algo.icepop_high={self.icepop_high}: no token would "
                "count; exchange them"
            )
        check_fields(self, "algo", problems)
