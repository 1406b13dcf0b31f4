"""EchoClip selection: chooses the tokens that are fed back as supervision.

Shapes: N rollouts, S positions held by this rank, K steps of the response with the most.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.echo.config import PER_GROUP, SPANS, EchoRLConfig
from echorl_nemo.echo.eligible import eligible_rollouts
from echorl_nemo.echo.entropy import step_entropy, step_lengths
from echorl_nemo.echo.spans import SpanInputs


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
    step_entropies = step_entropy(entropies, step_ids, reduction=config.step_reduction, group=group)
    n_steps = (lengths > 0).sum(dim=1)
    if lengths.shape[1] == 0:  # no response token in the whole batch
        lengths, step_entropies = (
            lengths.new_zeros(len(lengths), 1),
            step_entropies.new_full((len(step_entropies), 1), -torch.inf),
        )
    peak = step_entropies.argmax(dim=1)  # the earliest on ties
    peak_entropy = step_entropies.max(dim=1).values
    eligible = eligible_rollouts(rewards, finished, group_ids, config) & (n_steps > 0)
    n_eligible = float(eligible.sum())
    eligible = PER_GROUP.load(config.per_group)(peak_entropy, eligible, group_ids)
    inputs = SpanInputs(peak, step_entropies, lengths, n_steps, eligible, group_ids, config.seed)
    first, last, eligible = SPANS.load(config.span)(inputs)

    has_clip = eligible & (first <= last)
    inside = (step_ids >= first[:, None]) & (step_ids <= last[:, None]) & (step_ids >= 0)
    clip_tokens = torch.where(_columns(lengths, first, last), lengths, 0).sum(dim=1)[has_clip].sum()
    clips = int(has_clip.sum())
    stats = {
        "clips": float(clips),
        "clip_tokens": float(clip_tokens),
        "clip_share": float(clip_tokens) / max(1, int(lengths[has_clip].sum())),
        "relative_peak": _mean(inputs.relative_peak[has_clip]),
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


def _columns(lengths: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """[N, K] bool: the steps from ``first`` to ``last``."""
    steps = torch.arange(lengths.shape[1], device=lengths.device)
    return (steps >= first[:, None]) & (steps <= last[:, None])


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0
