"""The weight of the clip loss over a run, by `echorl.coef_schedule`.

Each schedule is a function of (config, step, entropy) that returns the factor of `echorl.coef`.
"""

import math

from echorl_nemo.echo.config import COEF_SCHEDULES, EchoRLConfig


def clip_coefficient(config: EchoRLConfig, *, step: int, entropy: float) -> float:
    """The weight of the clip loss in training step ``step``, from 0. ``entropy``: mean token entropy of the step's
    responses, nats."""
    factor: float = COEF_SCHEDULES.load(config.coef_schedule)(config, step, entropy)
    return config.coef * factor


def constant(config: EchoRLConfig, step: int, entropy: float) -> float:
    """Schedule `constant`: always 1."""
    return 1.0


def entropy(config: EchoRLConfig, step: int, entropy: float) -> float:
    """Schedule `entropy`: exp(mean entropy), so that the term fades as the policy gets certain (SRFT, arXiv 2506.19767:
    the weight of its loss on the policy's own successes)."""
    return math.exp(entropy)


def linear(config: EchoRLConfig, step: int, entropy: float) -> float:
    """Schedule `linear`: from 1 / `coef_warmup_steps` in the first step up to 1, then down to 0 over
    `coef_decay_steps`."""
    warmup, decay = config.coef_warmup_steps, config.coef_decay_steps
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, 1 - (step - warmup) / decay) if decay else 1.0
