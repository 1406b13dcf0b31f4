"""The settings of the method."""

from dataclasses import dataclass
from typing import Any

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

    coef: float = 1e-3
    """Weight of the clip loss in the objective; 1e-3 in the paper's script."""

    success_reward: float = 1.0
    """A finished rollout whose reward, before any shaping, is at least this is a verified success."""

    scope: str = "success"
    """Which rollouts may give a clip. `success`: every verified success. `degenerate`: only those of groups in which
    every rollout is rewarded with at least `success_reward`, where the group's advantages are all 0."""

    per_group: str = "all"
    """`all` eligible rollouts of a group, or `top`: only the one with the group's highest step entropy. With `top`
    there are few clips: use a smaller `coef`."""

    step_reduction: str = "mean"
    """How token entropies make a step's entropy: `mean`, `max` or `sum`."""

    boundary: Any = "newline"
    """Tokens that end a step: `newline` (every vocabulary entry whose text holds a newline) or a list of token ids."""

    span: str = "prefix"
    """What of the response is the clip. `prefix`: from its first token to the last of the peak step, the EchoClip.
    Controls: `full`, `peak_step`, `tail` (after the peak), `random_prefix` (ends with a random step),
    `lowest_prefix` (ends with the step of lowest entropy), `shuffled_prefix` (ends at the relative peak position of
    another success)."""

    normalizer: str = "clip_tokens"
    """What the summed clip loss is divided by, counted over the whole optimizer step: `clip_tokens`,
    `response_tokens` or `clips`."""

    entropy_source: str = "policy"
    """Where token entropies come from: `policy`, the scoring pass, or `rollout`, returned with the tokens."""

    seed: int = 0
    """Fixes `random_prefix` for each rollout, whatever the layout and the order of rollouts."""

    def __post_init__(self) -> None:
        words = {
            "scope": SCOPES,
            "per_group": PER_GROUP,
            "step_reduction": STEP_REDUCTIONS,
            "span": SPANS,
            "normalizer": NORMALIZERS,
            "entropy_source": ENTROPY_SOURCES,
        }
        for field, allowed in words.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"echorl.{field}={value!r} is not known; use one of {', '.join(allowed)}")
        if self.coef < 0:
            raise ValueError(f"echorl.coef={self.coef} is negative; it weighs a loss that is to fall, use 0 or more")
        is_ids = isinstance(self.boundary, (list, tuple)) and all(type(i) is int and i >= 0 for i in self.boundary)
        if self.boundary != "newline" and not (is_ids and self.boundary):
            raise ValueError(
                f"echorl.boundary={self.boundary!r} is not 'newline' or a list of token ids like [198,271]"
            )
