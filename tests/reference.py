"""Slow float64 references, written from design.md's definitions and from nothing else: plain loops over lists."""

import math
from dataclasses import dataclass
from fractions import Fraction
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
    before: list[int]
    """Number of steps that end before each token."""


def steps_before(tokens: list[int], response: list[bool], boundaries: set[int]) -> list[int]:
    """A step has ended as soon as one of its boundary tokens has come."""
    result, ended, in_run = [], 0, False
    for token, inside in zip(tokens, response, strict=True):
        result.append(ended if inside else 0)
        if inside:
            ended += token in boundaries and not in_run
            in_run = token in boundaries
    return result


def clips_of(rollouts: list[Rollout], config: Any) -> tuple[list[list[float]], list[int]]:
    """Token weights and peak step of each rollout, for the spans that no random draw decides."""
    heights = [entropies_of_steps(r.entropies, r.steps, config.step_reduction) for r in rollouts]
    eligible = []
    for i, rollout in enumerate(rollouts):
        fine = rollout.reward >= config.success_reward and rollout.finished and bool(heights[i])
        if config.scope == "degenerate":
            fine &= all(r.reward >= config.success_reward for r in rollouts if r.group == rollout.group)
        eligible.append(fine)
    if config.per_group != "all":
        choose = {"top": max, "lowest": min}[config.per_group]
        for group in {r.group for r in rollouts}:
            members = [i for i, r in enumerate(rollouts) if r.group == group and eligible[i]]
            if members:
                best = choose(max(heights[i]) for i in members)
                winner = next(i for i in members if max(heights[i]) == best)
                for i in members:
                    eligible[i] = i == winner
    chosen = [i for i in range(len(rollouts)) if eligible[i]]
    peak_of = {i: heights[i].index(max(heights[i])) for i in chosen}
    forks = sorted(
        entropy
        for i in chosen
        for entropy, step in zip(rollouts[i].entropies, rollouts[i].steps, strict=True)
        if step >= 0
    )
    least = forks[math.ceil((1 - Fraction(str(config.fork_share))) * (len(forks) - 1))] if forks else math.inf
    weights, peaks = [], []
    for i, rollout in enumerate(rollouts):
        weight, peak_step = [0.0] * len(rollout.steps), NO_CLIP
        if eligible[i]:
            peak, lowest, last = peak_of[i], heights[i].index(min(heights[i])), len(heights[i]) - 1
            others = [peak_of[j] for j in chosen if j != i]
            for t, step in enumerate(rollout.steps):
                if step >= 0:
                    weight[t] = {
                        "prefix": step <= peak,
                        "full": True,
                        "peak_step": step == peak,
                        "tail": step > peak,
                        "lowest_prefix": step <= lowest,
                        "clip_and_stop": step <= peak or step == last,
                        "fork_tokens": rollout.entropies[t] >= least,
                        "survival": sum(other >= rollout.before[t] for other in others) / max(1, len(others)),
                    }[config.span] * 1.0
            peak_step = peak if any(weight) else NO_CLIP
            if config.normalizer == "clip_mean" and any(weight):
                total = math.fsum(weight)
                weight = [w / total for w in weight]
        weights.append(weight)
        peaks.append(peak_step)
    return weights, peaks
