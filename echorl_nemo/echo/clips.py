"""EchoClip selection: chooses the tokens that are fed back as supervision.

Shapes: N rollouts, S positions held by this rank, K steps of the response with the most.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.echo.config import EchoRLConfig
from echorl_nemo.echo.entropy import step_entropy, step_lengths


@dataclass(frozen=True)
class ClipSelection:
    """The EchoClips of a batch."""

    mask: Tensor
    """[N, S] bool: the clip tokens."""

    peak_step: Tensor
    """[N] int64: the step with the highest entropy, whatever the span; -1 where the rollout has no clip."""

    peak_entropy: Tensor
    """[N] float32, nats: the entropy of the peak step; 0 where the rollout has no clip."""

    stats: dict[str, float]
    """`clips`, `clip_tokens`, `clip_share` (clip tokens over the response tokens of rollouts with a clip),
    `relative_peak` (mean position of the peak among its response's steps, in (0, 1)), `stop_coverage` (share of
    clips that hold the response's last token), `peak_entropy` (mean, nats), `eligible` (rollouts) and
    `unsegmented` (share of responses that are one step)."""


def select_clips(
    entropies: Tensor,
    step_ids: Tensor,
    *,
    rewards: Tensor,
    finished: Tensor,
    group_ids: Tensor,
    config: EchoRLConfig,
    group: dist.ProcessGroup | None = None,
) -> ClipSelection:
    """Select the EchoClip of every eligible rollout.

    ``entropies`` [N, S] nats and ``step_ids`` [N, S] as in `step_entropy`; ``rewards`` [N] before shaping;
    ``finished`` [N] bool, False for a truncated rollout; ``group_ids`` [N], the same for the rollouts of one prompt.
    The tensors must hold all rollouts of a group, and for `shuffled_prefix` all rollouts of the batch: gather them
    over data-parallel ranks first. ``group``: context-parallel ranks that share a row.

    Raises ValueError if an entropy within a response is not finite.
    """
    check_finite(entropies, step_ids)
    lengths = step_lengths(step_ids, group=group)
    heights = step_entropy(entropies, step_ids, reduction=config.step_reduction, group=group)
    n_steps = (lengths > 0).sum(dim=1)
    if lengths.shape[1] == 0:  # no response token in the whole batch
        lengths, heights = lengths.new_zeros(len(lengths), 1), heights.new_full((len(heights), 1), -torch.inf)
    peak = heights.argmax(dim=1)  # the earliest on ties
    peak_entropy = heights.max(dim=1).values
    eligible = eligible_rollouts(rewards, finished, group_ids, config) & (n_steps > 0)
    n_eligible = float(eligible.sum())
    if config.per_group == "top":
        eligible &= _highest_of_group(peak_entropy, eligible, group_ids)
    first, last, eligible = _span(config, peak, heights, lengths, n_steps, eligible, group_ids)

    has_clip = eligible & (first <= last)
    inside = (step_ids >= first[:, None]) & (step_ids <= last[:, None]) & (step_ids >= 0)
    clip_tokens = torch.where(_columns(lengths, first, last), lengths, 0).sum(dim=1)[has_clip].sum()
    clips = int(has_clip.sum())
    stats = {
        "clips": float(clips),
        "clip_tokens": float(clip_tokens),
        "clip_share": float(clip_tokens) / max(1, int(lengths[has_clip].sum())),
        "relative_peak": _mean(((peak + 0.5) / n_steps.clamp(min=1))[has_clip]),
        "stop_coverage": _mean((last == n_steps - 1)[has_clip]),
        "peak_entropy": _mean(peak_entropy[has_clip]),
        "eligible": n_eligible,
        "unsegmented": _mean((n_steps == 1)[n_steps > 0]),
    }
    return ClipSelection(
        mask=inside & has_clip[:, None],
        peak_step=torch.where(has_clip, peak, -1),
        peak_entropy=torch.where(has_clip, peak_entropy, 0.0),
        stats=stats,
    )


def check_finite(entropies: Tensor, step_ids: Tensor) -> None:
    """Raises ValueError naming the first response token whose entropy is not finite."""
    bad = ((step_ids >= 0) & ~torch.isfinite(entropies)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"entropies[{row}, {column}]={entropies[row, column].item()} is not finite ({len(bad)} such tokens): "
            "the policy's logits are broken, so that clips cannot be selected; look at the weights and trainer.lr"
        )


def eligible_rollouts(rewards: Tensor, finished: Tensor, group_ids: Tensor, config: EchoRLConfig) -> Tensor:
    """[N] bool: the finished verified successes; with scope `degenerate` only those of all-success groups."""
    success = rewards >= config.success_reward
    if config.scope == "degenerate":
        _, index = group_ids.unique(return_inverse=True)
        failures = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=torch.long, device=rewards.device)
        failures.scatter_add_(0, index, (~success).long())
        success = success & (failures[index] == 0)
    return success & finished


def _highest_of_group(peak_entropy: Tensor, eligible: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: for each group the eligible rollout with the highest peak, the earliest on ties."""
    _, index = group_ids.unique(return_inverse=True)
    n_groups = int(index.max()) + 1 if len(index) else 0
    height = torch.where(eligible, peak_entropy, -torch.inf)
    top = torch.full((n_groups,), -torch.inf, device=height.device).scatter_reduce(0, index, height, "amax")
    rows = torch.arange(len(height), device=height.device)
    candidates = torch.where(eligible & (height == top[index]), rows, len(rows))
    winner = torch.full((n_groups,), len(rows), device=height.device).scatter_reduce(0, index, candidates, "amin")
    return winner[index] == rows


def _span(
    config: EchoRLConfig,
    peak: Tensor,
    heights: Tensor,
    lengths: Tensor,
    n_steps: Tensor,
    eligible: Tensor,
    group_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """First and last step of each clip, both inclusive, and whether the rollout can have a clip, each [N]."""
    zero, end = torch.zeros_like(peak), n_steps - 1
    match config.span:
        case "prefix":
            return zero, peak, eligible
        case "full":
            return zero, end, eligible
        case "peak_step":
            return peak, peak, eligible
        case "tail":
            return peak + 1, end, eligible
        case "lowest_prefix":
            return zero, torch.where(lengths > 0, heights, torch.inf).argmin(dim=1), eligible
        case "random_prefix":
            prints = _fingerprint(lengths, heights, group_ids)
            return zero, _step_at(_uniform(prints, config.seed), n_steps), eligible
        case _:
            prints = _fingerprint(lengths, heights, group_ids)
            position, has_donor = _position_of_another((peak + 0.5) / n_steps.clamp(min=1), eligible, prints)
            return zero, _step_at(position, n_steps), eligible & has_donor


def _step_at(position: Tensor, n_steps: Tensor) -> Tensor:
    """The step at relative position ``position``, in [0, 1), of each response."""
    return torch.minimum((position * n_steps).long(), (n_steps - 1).clamp(min=0))


def _columns(lengths: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """[N, K] bool: the steps from ``first`` to ``last``."""
    steps = torch.arange(lengths.shape[1], device=lengths.device)
    return (steps >= first[:, None]) & (steps <= last[:, None])


def _mix(x: Tensor) -> Tensor:
    """A bijective scramble of int64, the finaliser of splitmix64 (Steele et al., OOPSLA 2014); wraps on overflow."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _fingerprint(lengths: Tensor, heights: Tensor, group_ids: Tensor) -> Tensor:
    """[N] int64: a hash of each rollout that does not depend on its row or rank. It is computed from the group, the
    step lengths and, among rollouts that agree in those, the rank of the peak entropy."""
    steps = torch.arange(1, lengths.shape[1] + 1, device=lengths.device)
    terms = torch.where(lengths > 0, _mix(lengths * 1_000_003 + steps), 0)
    shape = _mix(terms.sum(dim=1) + _mix(group_ids.long()))
    order = torch.argsort(heights.max(dim=1).values, stable=True)
    order = order[torch.argsort(shape[order], stable=True)]
    rows = torch.arange(len(order), device=order.device)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = shape[order][1:] != shape[order][:-1]
    place = torch.empty_like(order)
    place[order] = rows - torch.where(new, rows, 0).cummax(dim=0).values if len(order) else rows
    return _mix(shape + _mix(place + 1))


def _uniform(fingerprint: Tensor, seed: int) -> Tensor:
    """[N] float64 in [0, 1), fixed by ``fingerprint`` and ``seed``."""
    bits = _mix(fingerprint + _mix(torch.tensor(seed, device=fingerprint.device)))
    return ((bits >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def _position_of_another(position: Tensor, eligible: Tensor, fingerprint: Tensor) -> tuple[Tensor, Tensor]:
    """Relative peak position of another eligible rollout, [N] float64, and whether there is one, [N] bool.

    Rollouts are sorted by their fingerprints, which is a random order, and each one uses the position of the next, so
    that the pairing does not depend on the order of rows.
    """
    rows = eligible.nonzero()[:, 0]
    rows = rows[torch.argsort(fingerprint[rows], stable=True)]
    taken = torch.zeros_like(position, dtype=torch.float64)
    taken[rows] = position[rows.roll(-1)].double()
    return taken, eligible & (len(rows) > 1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0
