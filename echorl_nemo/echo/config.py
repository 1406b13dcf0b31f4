"""The settings of the method."""

from dataclasses import dataclass
from typing import Any

from echorl_nemo.ops.ranges import check_fields, number, word

SCOPES = ("success", "degenerate")
PER_GROUP = ("all", "top")
STEP_REDUCTIONS = ("mean", "max", "sum")
SPANS = ("prefix", "full", "peak_step", "tail", "random_prefix", "lowest_prefix", "shuffled_prefix")
NORMALIZERS = ("clip_tokens", "response_tokens", "clips")
ENTROPY_SOURCES = ("policy", "rollout")


@dataclass(kw_only=True)
class EchoRLConfig:
    """EchoClip selection and the auxiliary clip loss (arXiv 2605.31228)."""

    enabled: bool = True
    """False trains with the policy loss alone; clips are neither selected nor counted."""

    coef: float = number(1e-3, "[0, 1000000]", "it weighs a loss that is minimised")
    """Weight of the clip loss in the objective; 1e-3 in the paper's script."""

    success_reward: float = number(1.0, "[-1000000, 1000000]")
    """A finished rollout whose reward, before any shaping, is at least this is a verified success."""

    scope: str = word("success", SCOPES)
    """Which rollouts may give a clip. `success`: every verified success. `degenerate`: only those of groups in which
    every rollout is rewarded with at least `success_reward`, where the group's advantages are all 0."""

    per_group: str = word("all", PER_GROUP)
    """`all` eligible rollouts of a group, or `top`: only the one with the group's highest step entropy. With `top`
    there are few clips: use a smaller `coef`."""

    step_reduction: str = word("mean", STEP_REDUCTIONS)
    """How token entropies make a step's entropy: `mean`, `max` or `sum`."""

    boundary: Any = "newline"
    """Tokens that end a step: `newline` (every vocabulary entry whose text holds a newline) or a list of token ids."""

    span: str = word("prefix", SPANS)
    """What of the response is the clip. `prefix`: from its first token to the last of the peak step, the EchoClip.
    Controls: `full`, `peak_step`, `tail` (after the peak), `random_prefix` (ends with a random step),
    `lowest_prefix` (ends with the step of lowest entropy), `shuffled_prefix` (ends at the relative peak position of
    another success)."""

    normalizer: str = word("clip_tokens", NORMALIZERS)
    """What the summed clip loss is divided by, counted over the whole optimizer step: `clip_tokens`,
    `response_tokens` or `clips`."""

    entropy_source: str = word("policy", ENTROPY_SOURCES)
    """Where token entropies come from: `policy`, the scoring pass, or `rollout`, returned with the tokens."""

    seed: int = number(0, "[0, 9007199254740992]")
    """Fixes `random_prefix` for each rollout, whatever the layout and the order of rollouts."""

    def __post_init__(self) -> None:
        check_fields(self, "echorl", boundary_problems(self.boundary, "echorl.boundary"))


def boundary_problems(boundary: Any, key: str) -> list[str]:
    """What is wrong with the value of ``key``, the tokens that end a step."""
    is_ids = isinstance(boundary, (list, tuple)) and all(type(i) is int and i >= 0 for i in boundary)
    if boundary == "newline" or (is_ids and boundary):
        return []
    return [f"{key}={boundary!r} is not 'newline' or a list of token ids like [198,271]"]
