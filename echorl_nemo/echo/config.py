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
    {"all": "echorl_nemo.echo.eligible:all_of_group", "top": "echorl_nemo.echo.eligible:top_of_group"},
)
STEP_REDUCTIONS = ("mean", "max", "sum")
SPANS = Registry(
    "echorl.span",
    {
        name: f"echorl_nemo.echo.spans:{name}"
        for name in ("prefix", "full", "peak_step", "tail", "random_prefix", "lowest_prefix", "shuffled_prefix")
    },
    accepts_functions=True,
)
NORMALIZERS = Registry(
    "echorl.normalizer",
    {name: f"echorl_nemo.echo.loss:count_{name}" for name in ("clip_tokens", "response_tokens", "clips")},
)
ENTROPY_SOURCES = ("policy", "rollout")


@dataclass(kw_only=True)
class EchoRLConfig:
    """EchoClip selection and the auxiliary clip loss (arXiv 2605.31228)."""

    enabled: bool = True
    """False trains with only the policy loss; clips are neither selected nor counted."""

    coef: float = number(1e-3, "[0, 1000000]", "it is the weight of a loss that is minimised")
    """Weight of the clip loss in the objective; 1e-3 in the paper's script."""

    success_reward: float = number(1.0, "[-1000000, 1000000]")
    """A finished rollout whose reward, before any shaping, is at least this is a verified success."""

    scope: str = choice("success", SCOPES)
    """Rollouts that may have a clip. `success`: every verified success. `degenerate`: only those of groups in which
    every rollout's reward is at least `success_reward`, so that all advantages of the group are 0."""

    per_group: str = choice("all", PER_GROUP)
    """Clips of a group: `all`, one for each eligible rollout; `top`, only that of the rollout with the highest step
    entropy. With `top` there are few clips: use a smaller `coef`."""

    step_reduction: str = choice("mean", STEP_REDUCTIONS)
    """How the entropies of a step's tokens are combined: `mean`, `max` or `sum`."""

    boundary: Any = "newline"
    """Tokens that end a step: `newline` (every vocabulary entry whose text holds a newline) or a list of token ids."""

    span: str = choice("prefix", SPANS)
    """Part of the response that is the clip. `prefix`: from its first token to the last of the peak step, the EchoClip.
    Controls: `full`, `peak_step`, `tail` (after the peak), `random_prefix` (ends with a random step),
    `lowest_prefix` (ends with the step of lowest entropy), `shuffled_prefix` (ends at the relative peak position of
    another success). Or your own, `package.module:function`: see `echorl_nemo.echo.spans`."""

    normalizer: str = choice("clip_tokens", NORMALIZERS)
    """Divisor of the summed clip loss, counted over the whole optimizer step: `clip_tokens`, `response_tokens` or
    `clips`."""

    entropy_source: str = choice("policy", ENTROPY_SOURCES)
    """Source of the token entropies: `policy`, the scoring pass; `rollout`, returned by the rollout engine."""

    seed: int = number(0, "[0, 9007199254740992]")
    """Fixes `random_prefix` for each rollout, whatever the layout and the order of rollouts."""

    def __post_init__(self) -> None:
        check_fields(self, "echorl", boundary_problems(self.boundary, "echorl.boundary"))


def boundary_problems(boundary: Any, key: str) -> list[str]:
    """Problems with ``boundary``, the value of ``key``: the tokens that end a step."""
    is_ids = isinstance(boundary, (list, tuple)) and all(type(i) is int and i >= 0 for i in boundary)
    if boundary == "newline" or (is_ids and boundary):
        return []
    return [f"{key}={boundary!r} is not 'newline' or a list of token ids like [198,271]"]
