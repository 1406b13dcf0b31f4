"""Configuration of the RL objective: advantages, policy loss, KL, sampling filters."""

from dataclasses import dataclass

from echorl_nemo.ops.ranges import check_fields, choice, number
from echorl_nemo.ops.registry import Registry

ESTIMATORS = Registry(
    "algo.estimator",
    {
        name: f"echorl_nemo.grpo.advantages:{name}"
        for name in ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "maxrl", "mcpo")
    },
    accepts_functions=True,
)
LOSSES = Registry(
    "algo.loss",
    {name: f"echorl_nemo.grpo.loss:{name}_loss" for name in ("clipped", "gspo", "cispo")},
    accepts_functions=True,
)
AGGREGATIONS = Registry(
    "algo.aggregation",
    {name: f"echorl_nemo.grpo.loss:{name}" for name in ("rollout_mean", "token_mean", "constant")},
)
DEGENERATE = Registry(
    "algo.degenerate", {name: f"echorl_nemo.grpo.degenerate:{name}" for name in ("zero", "zvp", "avspo", "ngrpo")}
)
ANCHORS = Registry("algo.anchor", {name: f"echorl_nemo.grpo.anchor:{name}" for name in ("none", "mcpo")})
POLICY_TOKENS = Registry(
    "algo.policy_tokens",
    {
        "all": "echorl_nemo.grpo.token_advantages:all_tokens",
        "top_entropy": "echorl_nemo.grpo.token_advantages:top_entropy_tokens",
    },
)
DEMONSTRATIONS = ("none", "luffy", "uft")
DENOMINATORS = ("live", "all")
KL_ESTIMATORS = Registry("algo.kl_estimator", {name: f"echorl_nemo.grpo.kl:{name}" for name in ("k1", "k2", "k3")})
KL_PLACES = ("loss", "reward")
IMPORTANCES = ("policy", "rollout")
SUCCESS_ESTIMATORS = ("maxrl", "mcpo")
"""Estimators that divide by a function of the group's mean reward, which must be its share of successes."""
SUCCESS_ESTIMATORS_NOTE = (
    "it divides by a function of the mean reward, which must be the share of successes and not shaped; use "
    "algo.estimator=grpo, or leave the shaping out"
)


@dataclass(kw_only=True)
class AlgoConfig:
    """Advantages and policy loss. A method is a choice of these values: see `conf/algo/`."""

    estimator: str = choice("grpo", ESTIMATORS)
    """Advantage of a rollout: `grpo`, reward less its group's mean, over the group's standard deviation
    (arXiv 2402.03300, section 4.1.2); `dr_grpo`, without the division (2503.20783, section 3.2); `rloo`, reward less
    the mean of the group's others (2402.14740, section 3.2); `reinforce_plus_plus`, reward less the whole batch's mean,
    over its standard deviation (2501.03262, section 3); `maxrl`, reward less its group's mean, over that mean
    (2602.02710); `mcpo`, GRPO's, divided by 2 sqrt(p (1 - p)) where the share of successes p is above a half
    (2604.16972, equations 12 and 13). Or your own, `package.module:function`: see
    `echorl_nemo.grpo.advantages`."""

    degenerate: str = choice("zero", DEGENERATE)
    """Advantages of groups with equal rewards: `zero`; `zvp`, RL-ZVP, by the entropy of each token, upwards where all
    are right and downwards where all are wrong (2509.21880, equation 5); `avspo`, relative to virtual rewards if such
    groups are many (2605.21125, section 4); `ngrpo`, relative to one virtual success in every group (2509.18851)."""

    zvp_alpha: float = number(0.1, "[0, 1000]")
    """With `degenerate=zvp`: advantage for each nat of entropy; 0.1 to 0.2 in the paper."""

    policy_tokens: str = choice("all", POLICY_TOKENS)
    """Tokens that the policy loss learns from: `all`; `top_entropy`, those of the highest entropy of the step
    (2506.01939). Its divisor counts all tokens either way."""

    policy_token_share: float = number(0.2, "(0, 1]")
    """With `policy_tokens=top_entropy`: the share of the step's response tokens."""

    anchor: str = choice("none", ANCHORS)
    """A term that keeps the policy on prompts that all rollouts solve: `none`; `mcpo`, the hinge-KL to the policy that
    the step starts with (2604.16972, equation 11)."""

    anchor_coef: float = number(1.0, "[0, 1000000]")
    """Weight of the anchor's term in the objective."""

    anchor_budget: float = number(0.01, "[0, 20]")
    """With `anchor=mcpo`: change of a token's log-prob that costs nothing, nats."""

    demonstrations: str = choice("none", DEMONSTRATIONS)
    """How solutions of the data are learnt from: `none`; `luffy`, the solution is one more rollout of its group, whose
    loss has pi / (pi + `luffy_gamma`) in place of the clipped ratio (2504.14945); `uft`, the prompt ends with the
    beginning of the solution, which is shortened over the run and imitated (2505.16984). An expert's response gives no
    EchoClip: it is not the policy's own."""

    luffy_gamma: float = number(0.1, "(0, 1000]")
    """With `demonstrations=luffy`: gamma of the shaped probability."""

    hint_coef: float = number(1e-3, "[0, 1000000]")
    """With `demonstrations=uft`: weight of the NLL of the hints, mean over their tokens."""

    hint_steps: int = number(300, "[1, 1000000000]")
    """With `demonstrations=uft`: training steps in which prompts have hints."""

    hint_high: float = number(0.95, "[0, 1]")
    """With `demonstrations=uft`: share of the solution that is shown, at the start."""

    hint_low: float = number(0.05, "[0, 1]")
    """With `demonstrations=uft`: share of the solution that is shown, at the end of `hint_steps`."""

    loss: str = choice("clipped", LOSSES)
    """`clipped`, the ratio of each token clipped (1707.06347, equation 7); `gspo`, one ratio for a response, the
    geometric mean of its tokens' (2507.18071, equation 5); `cispo`, the clipped ratio as a constant weight of the
    log-prob, so that every token keeps its gradient (2506.13585, equation 4). Or your own, `package.module:function`:
    see `echorl_nemo.grpo.loss`."""

    clip_low: float = number(0.2, "[0, 1]", "1 means no lower bound")
    """The probability ratio is clipped below at 1 - clip_low; 1 means no lower bound."""

    clip_high: float = number(0.2, "[0, 1000000]")
    """The probability ratio is clipped above at 1 + clip_high; more than clip_low is DAPO's clip-higher
    (2503.14476, section 3.1)."""

    aggregation: str = choice("rollout_mean", AGGREGATIONS)
    """How the losses of tokens are combined, always over the whole optimizer step: `rollout_mean`, mean over each
    response, then over rollouts (GRPO); `token_mean`, mean over all response tokens (DAPO, section 3.3);
    `constant`, sum divided by rollouts x `constant_length` (Dr. GRPO, section 3.1)."""

    denominator: str = choice("live", DENOMINATORS)
    """Rollouts and tokens that `aggregation` counts: `live`, those of groups with an advantage other than 0, so that
    the other groups do not dilute the loss (and get neither KL nor entropy bonus); `all`, as in the papers'
    formulas."""

    constant_length: int = number(1024, "[1, 1000000000]")
    """Length of a response in the divisor of aggregation `constant`, tokens; usually the generation budget."""

    entropy_coef: float = number(0.0, "[0, 1000000]")
    """Weight of the entropy bonus, which is aggregated like the policy loss; 1e-3 in the EchoRL paper's script."""

    kl_coef: float = number(0.0, "[0, 1000000]")
    """Weight of the KL to the reference policy, which is the model that the run starts from; 0 keeps no reference."""

    kl_estimator: str = choice("k3", KL_ESTIMATORS)
    """Estimator of the KL from one sample, with r = pi_ref / pi: `k1`, -log r; `k2`, (log r)^2 / 2; `k3`,
    r - 1 - log r."""

    kl_in: str = choice("loss", KL_PLACES)
    """Where the KL is used: `loss`, a term added to the policy loss; `reward`, its sum over the response is subtracted
    from the reward."""

    importance: str = choice("policy", IMPORTANCES)
    """Log-probs in the denominator of the probability ratio: `policy`, those of the scoring pass before the step's
    first update; `rollout`, the rollout engine's own, so that the scoring pass is skipped. Then the ratio includes the
    mismatch of engine and policy, and the clip bounds it."""

    tis_cap: float | None = number(None, "(0, 1000000]", "null is off")
    """Truncated importance sampling: a token's loss is weighted by pi_old / pi_rollout, at most this; 2 is usual. Null
    is off. It corrects the mismatch of rollout engine and policy."""

    icepop_low: float | None = number(None, "(0, 1000000]", "null is off")
    """IcePop: a token whose pi_old / pi_rollout is below this does not count; 0.5 is usual. Null is off."""

    icepop_high: float | None = number(None, "(0, 1000000]", "null is off")
    """IcePop: a token whose pi_old / pi_rollout is above this does not count; 5 is usual. Null is off."""

    dynamic_sampling: bool = False
    """Generate from further prompts until `trainer.prompts_per_step` groups have different rewards (DAPO, section 3.2).
    Groups without success are dropped. All-success groups are kept for their EchoClips and not counted."""

    dynamic_sampling_rounds: int = number(4, "[1, 1000000]")
    """Largest number of rounds of `trainer.prompts_per_step` prompts. After them the step trains on the groups it
    has."""

    overlong_buffer: int = number(0, "[0, 10000000]", "0 is off")
    """Soft punishment of long responses (DAPO, section 3.4): within the last `overlong_buffer` tokens of the budget the
    reward falls linearly by `overlong_penalty`. Success is decided before; 0 is off."""

    overlong_penalty: float = number(1.0, "[0, 1000000]")
    """Reward that a response of full length loses, with `overlong_buffer`."""

    overlong_filter: bool = False
    """Leave truncated rollouts out of the policy loss (DAPO, section 3.4)."""

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
        if self.demonstrations == "uft" and 1 >= self.hint_low > self.hint_high >= 0:
            problems.append(
                f"algo.hint_low={self.hint_low} is above algo.hint_high={self.hint_high}: hints get shorter over the "
                "run; exchange them"
            )
        if self.estimator in SUCCESS_ESTIMATORS:
            problems += [
                f"algo.{key}={getattr(self, key)} with algo.estimator={self.estimator}: {SUCCESS_ESTIMATORS_NOTE}"
                for key, used in (
                    ("kl_in", self.kl_coef and self.kl_in == "reward"),
                    ("overlong_buffer", self.overlong_buffer),
                )
                if used
            ]
        if self.degenerate in ("avspo", "ngrpo") and self.estimator != "grpo":
            problems.append(
                f"algo.degenerate={self.degenerate} with algo.estimator={self.estimator}: virtual rewards change mean "
                "and deviation, so that it needs algo.estimator=grpo"
            )
        if self.demonstrations == "luffy" and self.importance == "rollout":
            problems.append(
                "algo.importance=rollout with algo.demonstrations=luffy: the rollout engine has no log-probs of a "
                "solution; use importance=policy"
            )
        if self.dynamic_sampling:
            problems += [
                f"algo.{key}={getattr(self, key)} with algo.dynamic_sampling=true: it learns from the groups that "
                "dynamic sampling drops; use one of them"
                for key, off in (("degenerate", "zero"), ("anchor", "none"))
                if getattr(self, key) != off
            ]
        check_fields(self, "algo", problems)
