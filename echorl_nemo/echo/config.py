"""Configuration of the method: clip selection and clip loss."""

from dataclasses import dataclass
from typing import Any

from echorl_nemo.ops.ranges import check_fields, choice, number
from echorl_nemo.ops.registry import Registry

SCOPES = Registry(
    "echorl.scope",
    {"success": "echorl_nemo.echo.eligible:success", "degenerate": "echorl_nemo.echo.eligible:degenerate"},
)
PER_GROUP = Registry(
    "echorl.per_group",
    {name: f"echorl_nemo.echo.eligible:{name}_of_group" for name in ("all", "top", "lowest")},
)
STEP_REDUCTIONS = ("mean", "max", "sum")
SPANS = Registry(
    "echorl.span",
    {
        name: f"echorl_nemo.echo.spans:{name}"
        for name in (
            "prefix",
            "full",
            "peak_step",
            "tail",
            "random_prefix",
            "lowest_prefix",
            "shuffled_prefix",
            "clip_and_stop",
            "fork_tokens",
            "survival",
        )
    },
    accepts_functions=True,
)
NORMALIZERS = Registry(
    "echorl.normalizer",
    {
        name: f"echorl_nemo.echo.loss:count_{name}"
        for name in ("clip_mean", "clip_tokens", "response_tokens", "constant")
    },
)
TOKEN_WEIGHTS = Registry(
    "echorl.token_weight", {name: f"echorl_nemo.echo.loss:{name}_weight" for name in ("one", "probability")}
)
COEF_SCHEDULES = Registry(
    "echorl.coef_schedule", {name: f"echorl_nemo.echo.schedule:{name}" for name in ("constant", "entropy", "linear")}
)
FORK_THRESHOLDS = ("step", "running")
ENTROPY_SOURCES = ("policy", "rollout")


@dataclass(kw_only=True)
class EchoRLConfig:
    """EchoClip selection and the auxiliary clip loss (arXiv 2605.31228)."""

    enabled: bool = True
    """False trains with only the policy loss; clips are neither selected nor counted."""

    coef: float = number(1e-3, "[0, 1000000]", "it is the weight of a loss that is minimised")
    """Weight of the clip loss in the objective; 1e-3 in the paper's script."""

    coef_schedule: str = choice("constant", COEF_SCHEDULES)
    """How the weight changes over the run: `constant`; `entropy`, `coef` x exp(mean token entropy of the step), so that
    it falls with the entropy (SRFT, arXiv 2506.19767); `linear`, a rise over `coef_warmup_steps`, then a fall to 0 over
    `coef_decay_steps`."""

    coef_warmup_steps: int = number(0, "[0, 1000000000]", "0 is off")
    """With `coef_schedule=linear`: training steps in which the weight rises from 0 to `coef`; 0 is off."""

    coef_decay_steps: int = number(0, "[0, 1000000000]", "0 is off")
    """With `coef_schedule=linear`: training steps after the warm-up in which the weight falls from `coef` to 0; 0 is
    off."""

    success_reward: float = number(1.0, "[-1000000, 1000000]")
    """A finished rollout whose reward, before any shaping, is at least this is a verified success."""

    scope: str = choice("success", SCOPES)
    """Rollouts that may have a clip. `success`: every verified success. `degenerate`: only those of groups in which
    every rollout's reward is at least `success_reward`, so that all advantages of the group are 0."""

    per_group: str = choice("top", PER_GROUP)
    """Clips of a group: `top`, only that of the rollout with the highest step entropy, as in the paper; `all`, one for
    each eligible rollout; `lowest`, only that of the rollout whose highest step entropy is the group's lowest
    (the rollout that ExGRPO prefers, arXiv 2510.02245)."""

    step_reduction: str = choice("mean", STEP_REDUCTIONS)
    """How the entropies of a step's tokens are combined: `mean`, `max` or `sum`."""

    boundary: Any = "newline"
    """Tokens that end a step: `newline` (every vocabulary entry whose text holds a newline) or a list of token ids."""

    span: str = choice("prefix", SPANS)
    """Tokens of the response that are supervised, with their weights. `prefix`: from the first token to the last of the
    peak step, the EchoClip. `clip_and_stop`: the EchoClip and the last step. `fork_tokens`: tokens whose entropy is at
    least a threshold, see `fork_share`. `survival`: every token, weighted by the share of the batch's other clips whose
    peak step the response has not yet passed. Controls: `full`, `peak_step`, `tail` (after the peak), `random_prefix`
    (ends with a random step), `lowest_prefix` (ends with the step of lowest entropy), `shuffled_prefix` (ends at the
    relative peak position of another success). Or your own, `package.module:function`: see `echorl_nemo.echo.spans`."""

    fork_share: float = number(0.2, "(0, 1]")
    """With `span=fork_tokens`: the share of the eligible rollouts' response tokens, those of highest entropy, whose
    lowest entropy is the threshold; 0.2 in arXiv 2506.01939."""

    fork_threshold: str = choice("step", FORK_THRESHOLDS)
    """With `span=fork_tokens`: `step` takes this step's threshold; `running` the exponential mean of those of earlier
    steps, which is saved with checkpoints. The first step takes its own."""

    fork_decay: float = number(0.9, "[0, 1)")
    """With `fork_threshold=running`: the weight of the mean so far when a step's threshold is added."""

    normalizer: str = choice("clip_mean", NORMALIZERS)
    """Divisor of the clip loss, counted over the whole optimizer step: `clip_mean`, the mean over each clip's own
    tokens, then over clips, as in the paper; `clip_tokens`, the sum of all token weights; `response_tokens`, of every
    rollout; `constant`, prompts of an optimizer step x `constant_length`, whatever was sampled."""

    constant_length: int = number(1024, "[1, 1000000000]")
    """Length of a clip in the divisor of normalizer `constant`, tokens."""

    token_weight: str = choice("one", TOKEN_WEIGHTS)
    """A further factor of each token's loss: `one`; `probability`, the policy's own probability of the token, without a
    gradient, which damps rarely sampled tokens (DFT, arXiv 2508.05629)."""

    entropy_source: str = choice("policy", ENTROPY_SOURCES)
    """Source of the token entropies: `policy`, the scoring pass; `rollout`, returned by the rollout engine."""

    seed: int = number(0, "[0, 9007199254740992]")
    """Fixes `random_prefix` for each rollout, whatever the layout and the order of rollouts."""

    def __post_init__(self) -> None:
        problems = boundary_problems(self.boundary, "echorl.boundary")
        steps = {"coef_warmup_steps": self.coef_warmup_steps, "coef_decay_steps": self.coef_decay_steps}
        if self.coef_schedule == "linear" and not any(steps.values()):
            problems.append(
                "echorl.coef_schedule=linear with no steps to rise or fall in is constant; set "
                "echorl.coef_warmup_steps or echorl.coef_decay_steps, or use constant"
            )
        if self.coef_schedule != "linear":
            problems += [
                f"echorl.{key}={value} with echorl.coef_schedule={self.coef_schedule}: only linear uses it; set "
                "echorl.coef_schedule=linear, or leave it 0"
                for key, value in steps.items()
                if type(value) is int and value > 0
            ]
        check_fields(self, "echorl", problems)


def needs_steps_before(config: EchoRLConfig) -> bool:
    """Whether the span takes `SpanInputs.steps_before`: `survival`, and any function of the user's."""
    return config.span == "survival" or config.span not in tuple(SPANS)


def boundary_problems(boundary: Any, key: str) -> list[str]:
    """Problems with ``boundary``, the value of ``key``: the tokens that end a step."""
    is_ids = isinstance(boundary, (list, tuple)) and all(type(i) is int and i >= 0 for i in boundary)
    if boundary == "newline" or (is_ids and boundary):
        return []
    return [f"{key}={boundary!r} is not 'newline' or a list of token ids like [198,271]"]
