"""The paper's EchoClip and its loss (arXiv 2605.31228), from the formulas and from nothing of the package.

Float64, plain loops: all steps of all verified successes of a prompt are one pool; the step of highest mean entropy
ends the clip; mean over the clip's tokens, then over the prompts that have one.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    tokens: list[int]
    response: list[bool]
    entropies: list[float]
    logprobs: list[float]
    success: bool
    """Rewarded with at least `success_reward`, and finished."""
    prompt: int


def rows_of(batch: Any, entropies: Any, logprobs: Any, *, success_reward: float = 1.0) -> list[Row]:
    """The rows of an object with `tokens`, `response_mask`, `rewards`, `finished` and `group_ids`."""
    return [
        Row(
            batch.tokens[i].tolist(), batch.response_mask[i].tolist(), entropies[i].tolist(), logprobs[i].tolist(),
            bool(batch.rewards[i] >= success_reward and batch.finished[i]), int(batch.group_ids[i]),
        )
        for i in range(len(batch.tokens))
    ]  # fmt: skip


def paper(rows: list[Row], boundaries: set[int]) -> tuple[list[list[float]], float]:
    """The weight of every token, and the loss."""
    best: dict[int, tuple[float, int, int]] = {}  # step entropy, row and last token of each prompt's clip
    for i, row in enumerate(rows):
        positions = [t for t, inside in enumerate(row.response) if inside and row.success]
        step: list[int] = []
        for t, following in zip(positions, [*positions[1:], None][: len(positions)], strict=True):
            step.append(t)
            ends = row.tokens[t] in boundaries and following is not None and row.tokens[following] not in boundaries
            if ends or following is None:
                mean = math.fsum(row.entropies[u] for u in step) / len(step)
                if row.prompt not in best or mean > best[row.prompt][0]:
                    best[row.prompt] = mean, i, t
                step = []
    weights = [[0.0] * len(row.tokens) for row in rows]
    loss = 0.0
    for _, i, end in best.values():
        clip = [t for t, inside in enumerate(rows[i].response) if inside and t <= end]
        loss -= math.fsum(rows[i].logprobs[t] for t in clip) / len(clip) / len(best)
        for t in clip:
            weights[i][t] = 1 / len(clip)
    return weights, loss
