"""Learning from demonstrations, by `algo.demonstrations`: the loss of an expert's response, and the length of hints."""

import math

import torch
from torch import Tensor

from echorl_nemo.grpo.config import AlgoConfig


def expert_loss(logprobs: Tensor, advantages: Tensor, gamma: float) -> Tensor:
    """The loss of each token of an expert's response, [N, S]: -A pi / (pi + gamma) in place of the clipped ratio, with
    the expert's own probability taken as 1 (LUFFY, arXiv 2504.14945, section 3; `p_div_p_0.1` of its mix_core_alg.py).

    ``logprobs`` [N, S] nats; ``advantages`` [N, 1] or [N, S].
    """
    probability = logprobs.exp()
    return -advantages * probability / (probability + gamma)


def hint_share(config: AlgoConfig, step: int) -> float:
    """The probability, in training step ``step`` from 0, that each part of a solution is shown: falls as a cosine from
    `hint_high` to `hint_low` in `hint_steps` steps, and is 0 after them (UFT, arXiv 2505.16984; its rl_dataset.py)."""
    count = step + 1
    if count > config.hint_steps:
        return 0.0
    swing = (1 + math.cos(math.pi * count / config.hint_steps)) / 2
    return config.hint_low + (config.hint_high - config.hint_low) * swing


def hint_length(tokens: int, config: AlgoConfig, *, step: int, seed: int) -> int:
    """How many of a solution's ``tokens`` are shown: of `HINT_PARTS` equal parts as many as a binomial draw gives,
    which ``seed`` fixes."""
    generator = torch.Generator().manual_seed(seed)
    parts = min(HINT_PARTS, tokens)
    shown = int((torch.rand(HINT_PARTS, generator=generator)[:parts] < hint_share(config, step)).sum())
    return round(shown * tokens / parts) if parts else 0


HINT_PARTS = 5
"""UFT's rl_dataset.py cuts a solution into this many parts."""
