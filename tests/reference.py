"""Slow float64 references, written from design.md's definitions and from nothing else: plain loops over lists."""

import math
from dataclasses import dataclass
from typing import Any

NO_CLIP = -1


def steps_of(tokens: list[int], response: list[bool], boundaries: set[int]) -> list[int]:
    """A step ends with its boundary tokens; a run of them ends one step; the rest is the last step."""
    result, step, ended = [], 0, False
    for token, inside in zip(tokens, response, strict=True):
        if not inside:
            result.append(-1)
            continue
        if ended and token not in boundaries:
            step, ended = step + 1, False
        if token in boundaries:
            ended = True
        result.append(step)
    return result


def entropies_of_steps(entropies: list[float], steps: list[int], reduction: str) -> list[float]:
    values: dict[int, list[float]] = {}
    for entropy, step in zip(entropies, steps, strict=True):
        if step >= 0:
            values.setdefault(step, []).append(entropy)
    results = []
    for step in sorted(values):
        total = math.fsum(values[step])
        results.append({"mean": total / len(values[step]), "max": max(values[step]), "sum": total}[reduction])
    return results


@dataclass
class Rollout:
    entropies: list[float]
    steps: list[int]
    reward: float
    finished: bool
    group: int


def clips_of(rollouts: list[Rollout], config: Any) -> tuple[list[list[bool]], list[int]]:
    """Mask and peak step of each rollout for the spans that no random draw decides."""
    heights = [entropies_of_steps(r.entropies, r.steps, config.step_reduction) for r in rollouts]
    eligible = []
    for i, rollout in enumerate(rollouts):
        fine = rollout.reward >= config.success_reward and rollout.finished and bool(heights[i])
        if config.scope == "degenerate":
            fine &= all(r.reward >= config.success_reward for r in rollouts if r.group == rollout.group)
        eligible.append(fine)
    if config.per_group == "top":
        for group in {r.group for r in rollouts}:
            members = [i for i, r in enumerate(rollouts) if r.group == group and eligible[i]]
            if members:
                best = max(max(heights[i]) for i in members)
                winner = next(i for i in members if max(heights[i]) == best)
                for i in members:
                    eligible[i] = i == winner
    masks, peaks = [], []
    for i, rollout in enumerate(rollouts):
        mask, peak_step = [False] * len(rollout.steps), NO_CLIP
        if eligible[i]:
            peak = heights[i].index(max(heights[i]))
            lowest = heights[i].index(min(heights[i]))
            last = len(heights[i]) - 1
            first_step, last_step = {
                "prefix": (0, peak),
                "full": (0, last),
                "peak_step": (peak, peak),
                "tail": (peak + 1, last),
                "lowest_prefix": (0, lowest),
            }[config.span]
            mask = [first_step <= step <= last_step and step >= 0 for step in rollout.steps]
            peak_step = peak if any(mask) else NO_CLIP
        masks.append(mask)
        peaks.append(peak_step)
    return masks, peaks
