"""EchoClip selection: chooses the tokens that are fed back as supervision, and their weights.

Shapes: n rollouts of this rank, N of all data-parallel ranks, S positions held by this rank, K steps of the response
with the most.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from echorl_nemo.echo.config import PER_GROUP, SPANS, EchoRLConfig
from echorl_nemo.echo.eligible import eligible_rollouts
from echorl_nemo.echo.entropy import step_table
from echorl_nemo.echo.predictable import unpredictable_settings
from echorl_nemo.echo.rows import Rows
from echorl_nemo.echo.spans import SpanInputs
from echorl_nemo.ops.entropy_threshold import entropy_threshold, running_threshold
from echorl_nemo.ops.results import tensor_of_shape


@dataclass(frozen=True)
class ClipSelection:
    """The EchoClips of a batch."""

    weight: Tensor
    """[n, S] float32 >= 0: the weight of each token in the clip loss. With normalizer `clip_mean` those of a clip sum
    to 1."""

    peak_step: Tensor
    """[n] int64: the step with the highest entropy, whatever the span; -1 where the rollout has no clip."""

    peak_entropy: Tensor
    """[n] float32, nats: the entropy of the peak step; 0 where the rollout has no clip."""

    stats: dict[str, float]
    """Over the rollouts of all ranks: `clips`, `clip_tokens` (tokens with a weight), `clip_share` (clip tokens over the
    response tokens of rollouts with a clip), `relative_peak` (mean position of the peak among its response's steps, in
    (0, 1)), `stop_coverage` (share of clips that hold the response's last token; of rows that are split over ranks, a
    token of its last step), `peak_entropy` (mean, nats), `eligible` (rollouts), `unsegmented` (share of responses that
    are one step) and `predictable` (1 if a token's weight depends only on what came before it, else 0); with
    `span=fork_tokens` also `fork_threshold` (nats)."""

    next_threshold: float | None = None
    """With `fork_threshold=running`: the argument ``threshold`` of the next step, nats."""


def select_clips(
    entropies: Tensor,
    step_ids: Tensor,
    *,
    rewards: Tensor,
    finished: Tensor,
    group_ids: Tensor,
    config: EchoRLConfig,
    group: dist.ProcessGroup | None = None,
    data_group: dist.ProcessGroup | None = None,
    steps_before: Tensor | None = None,
    threshold: float | None = None,
) -> ClipSelection:
    """Select the EchoClips of a batch: the tokens that are supervised, with their weights.

    ``entropies`` [n, S] nats and ``step_ids`` [n, S] as in `step_entropy`; ``rewards`` [n] before shaping;
    ``finished`` [n] bool, False for a truncated rollout; ``group_ids`` [n], the same for the rollouts of one prompt.
    ``group``: context-parallel ranks that share a row. ``data_group``: the ranks that hold the batch's other rows; of
    those only columns are exchanged, a few values for each rollout and step. ``steps_before`` [n, S]: what
    `count_steps_before` returns, for `span=survival`. ``threshold``: `next_threshold` of the step before, for
    `fork_threshold=running`.

    Raises ValueError if an entropy within a response is not finite, if the span needs an argument that is missing, or
    if a user's span does not return weights.
    """
    check_finite(entropies, step_ids)
    table = step_table(entropies, step_ids, reduction=config.step_reduction, group=group)
    rows = Rows(len(entropies), entropies.device, data_group)
    lengths, heights = rows.gather(table.lengths), rows.gather(table.entropies, fill=-torch.inf)
    rewards, finished, group_ids = rows.gather(rewards), rows.gather(finished), rows.gather(group_ids)
    n_steps = (lengths > 0).sum(dim=1)
    peak = heights.argmax(dim=1)  # the earliest on ties
    peak_entropy = heights.max(dim=1).values
    eligible = eligible_rollouts(rewards, finished, group_ids, config) & (n_steps > 0)
    n_eligible = float(eligible.sum())
    eligible = PER_GROUP.load(config.per_group)(peak_entropy, eligible, group_ids)

    threshold, next_threshold = _fork_threshold(
        entropies, (step_ids >= 0) & eligible[rows.own, None], config, threshold, (group, data_group)
    )
    inputs = SpanInputs(
        peak, heights, lengths, n_steps, eligible, group_ids, config.seed, rows.own, entropies, step_ids, steps_before,
        torch.inf if threshold is None else threshold,
    )  # fmt: skip
    weight = _span_weight(inputs, (step_ids >= 0) & eligible[rows.own, None], config.span)
    clip = _clip_columns(weight, step_ids, n_steps[rows.own], group)
    if config.normalizer == "clip_mean":
        weight /= torch.where(clip[:, :1] > 0, clip[:, :1], 1.0).to(weight.dtype)

    total, tokens, holds_end = rows.gather(clip).unbind(dim=1)
    has_clip = total > 0
    stats = {
        "clips": float(has_clip.sum()),
        "clip_tokens": float(tokens.sum()),
        "clip_share": float(tokens.sum()) / max(1, int(lengths[has_clip].sum())),
        "relative_peak": _mean(inputs.relative_peak[has_clip]),
        "stop_coverage": _mean(holds_end[has_clip]),
        "peak_entropy": _mean(peak_entropy[has_clip]),
        "eligible": n_eligible,
        "unsegmented": _mean((n_steps == 1)[n_steps > 0]),
        "predictable": float(not unpredictable_settings(config)),
    }
    if threshold is not None:
        stats["fork_threshold"] = threshold
    own = has_clip[rows.own]
    return ClipSelection(
        weight=weight,
        peak_step=torch.where(own, peak[rows.own], -1),
        peak_entropy=torch.where(own, peak_entropy[rows.own], 0.0),
        stats=stats,
        next_threshold=next_threshold,
    )


def _fork_threshold(
    entropies: Tensor,
    inside: Tensor,
    config: EchoRLConfig,
    earlier: float | None,
    groups: tuple[dist.ProcessGroup | None, ...],
) -> tuple[float | None, float | None]:
    """This step's threshold and that of the next step, nats; None for a span that takes none."""
    if config.span != "fork_tokens":
        return None, None
    own = entropy_threshold(
        entropies, inside, config.fork_share, groups=[group for group in groups if group is not None]
    )
    if config.fork_threshold == "step":
        return own, None
    return own if earlier is None else earlier, running_threshold(earlier, own, config.fork_decay)


def _span_weight(inputs: SpanInputs, inside: Tensor, span: str) -> Tensor:
    """[n, S] float32: the weights that the span gives, 0 outside ``inside`` [n, S] bool. Raises ValueError if they are
    not [n, S], finite and >= 0."""
    weight = tensor_of_shape(SPANS.load(span)(inputs), inside.shape, f"echorl.span={span}")
    weight = torch.where(inside, weight.float(), 0.0)
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ValueError(f"echorl.span={span} returned weights that are negative or not finite; return 0 or more")
    return weight


def _clip_columns(weight: Tensor, step_ids: Tensor, n_steps: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[n, 3] float64 of each whole row: sum of the weights, tokens with a weight, and whether the last token has one
    (of a row that is split over ``group``, a token of the last step)."""
    inside = weight > 0
    if group is not None:
        holds_end = (inside & (step_ids == n_steps[:, None] - 1)).any(dim=1)
    else:
        positions = torch.arange(1, weight.shape[1] + 1, dtype=torch.int32, device=weight.device)
        # one more column in front, so that a row without a response has a last position: 0
        last = pad(torch.where(step_ids >= 0, positions, 0), (1, 0)).amax(dim=1).long()
        holds_end = pad(inside, (1, 0)).gather(1, last[:, None])[:, 0]
    columns = torch.stack(
        [weight.sum(dim=1, dtype=torch.float64), inside.sum(dim=1).double(), holds_end.double()], dim=1
    )
    if group is not None:
        dist.all_reduce(columns, group=group)
        columns[:, 2].clamp_(max=1.0)
    return columns


def check_finite(entropies: Tensor, step_ids: Tensor) -> None:
    """Raises ValueError naming the first response token whose entropy is not finite."""
    bad = ((step_ids >= 0) & ~torch.isfinite(entropies)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"entropies[{row}, {column}]={entropies[row, column].item()} is not finite ({len(bad)} such tokens): "
            "the policy's logits are broken, so that clips cannot be selected; look at the weights and trainer.lr"
        )


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0
