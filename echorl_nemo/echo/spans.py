"""Spans: which tokens of a response are supervised, and how much, by `echorl.span`.

Each span is a function from `SpanInputs` to the weights of the rank's tokens, [n, S] float32 >= 0. What it gives
outside the response, or for rollouts that are not eligible, is ignored. A user's own function has the same form.

Shapes: N rollouts of the batch, n of them on this rank, S positions, K steps of the response with the most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from echorl_nemo.echo.random_choice import fingerprints, uniform


@dataclass(frozen=True)
class SpanInputs:
    """What a span may depend on."""

    peak: Tensor
    """[N] int64: the step with the highest entropy."""
    step_entropies: Tensor
    """[N, K] float32, nats; -inf where a rollout has no such step."""
    step_lengths: Tensor
    """[N, K] int64: tokens of each step; 0 where a rollout has no such step."""
    n_steps: Tensor
    """[N] int64: number of steps of each response."""
    eligible: Tensor
    """[N] bool: rollouts that may have a clip."""
    group_ids: Tensor
    """[N] int64: the same for the rollouts of one prompt."""
    seed: int
    """Seed of random choices, `echorl.seed`."""
    rows: slice
    """Rows of this rank among the N."""
    entropies: Tensor
    """[n, S] float32, nats, of this rank's tokens."""
    step_ids: Tensor
    """[n, S] int64: the step of each of this rank's tokens; -1 outside the response."""
    steps_before: Tensor | None = None
    """[n, S] int64: number of steps that end before each token (`count_steps_before`)."""
    threshold: float = torch.inf
    """Nats: the entropy from which a token is a fork, the same on every rank; inf where nothing asks for one."""

    @property
    def start(self) -> Tensor:
        """[N] zeros: the first step of each response."""
        return torch.zeros_like(self.peak)

    @property
    def end(self) -> Tensor:
        """[N]: the last step of each response."""
        return self.n_steps - 1

    @property
    def relative_peak(self) -> Tensor:
        """[N]: position of the peak among the steps of its response, in (0, 1)."""
        return (self.peak + 0.5) / self.n_steps.clamp(min=1)

    def tokens_of_steps(self, first: Tensor, last: Tensor) -> Tensor:
        """[n, S] float32: 1 for this rank's tokens from step ``first`` [N] to the end of step ``last`` [N], else 0."""
        first, last = first[self.rows, None], last[self.rows, None]
        return ((self.step_ids >= first) & (self.step_ids <= last)).float()


def prefix(inputs: SpanInputs) -> Tensor:
    """From the first token to the end of the peak step: the EchoClip."""
    return inputs.tokens_of_steps(inputs.start, inputs.peak)


def clip_and_stop(inputs: SpanInputs) -> Tensor:
    """The EchoClip and the last step, which holds the tokens that end the response."""
    return torch.maximum(prefix(inputs), inputs.tokens_of_steps(inputs.end, inputs.end))


def fork_tokens(inputs: SpanInputs) -> Tensor:
    """The tokens whose entropy is at least the threshold (arXiv 2506.01939)."""
    # in float32, as the threshold is counted
    return (inputs.entropies.float().clamp(min=0) >= inputs.threshold).float()


def survival(inputs: SpanInputs) -> Tensor:
    """Every token, weighted by the share of the batch's OTHER eligible rollouts whose peak step is at or after the
    number of steps that end before the token: the average EchoClip of the others. 0 if there is no other.

    The number of a token's own step would look at the token itself, since a boundary that follows a boundary still
    belongs to the old step.
    """
    if inputs.steps_before is None:
        raise ValueError("echorl.span=survival needs steps_before; give select_clips what count_steps_before returns")
    steps = torch.arange(inputs.step_lengths.shape[1] + 1, device=inputs.peak.device)
    peaks = torch.bincount(inputs.peak[inputs.eligible], minlength=len(steps))
    reaching = peaks.flip(0).cumsum(0).flip(0)  # [K + 1]: eligible rollouts whose peak is at or after each step
    others = inputs.eligible.sum() - 1
    own = inputs.peak[inputs.rows, None] >= steps
    shares = (reaching - own.long()) / others.clamp(min=1) * (others > 0)
    return shares.float().gather(1, inputs.steps_before)


def full(inputs: SpanInputs) -> Tensor:
    """The whole response."""
    return inputs.tokens_of_steps(inputs.start, inputs.end)


def peak_step(inputs: SpanInputs) -> Tensor:
    """Only the peak step."""
    return inputs.tokens_of_steps(inputs.peak, inputs.peak)


def tail(inputs: SpanInputs) -> Tensor:
    """Everything after the peak step."""
    return inputs.tokens_of_steps(inputs.peak + 1, inputs.end)


def lowest_prefix(inputs: SpanInputs) -> Tensor:
    """From the first token to the end of the step with the lowest entropy."""
    lowest = torch.where(inputs.step_lengths > 0, inputs.step_entropies, torch.inf).argmin(dim=1)
    return inputs.tokens_of_steps(inputs.start, lowest)


def random_prefix(inputs: SpanInputs) -> Tensor:
    """From the first token to the end of a random step, which the seed and the rollout determine."""
    prints = fingerprints(inputs.step_lengths, inputs.step_entropies, inputs.group_ids)
    return inputs.tokens_of_steps(inputs.start, _step_at(uniform(prints, inputs.seed), inputs.n_steps))


def shuffled_prefix(inputs: SpanInputs) -> Tensor:
    """From the first token to the relative peak position of another eligible rollout; no clip if there is none.

    Rollouts are sorted by their fingerprints, which is a random order, and each one uses the position of the next, so
    that the pairing does not depend on the order of rows.
    """
    prints = fingerprints(inputs.step_lengths, inputs.step_entropies, inputs.group_ids)
    rows = inputs.eligible.nonzero()[:, 0]
    rows = rows[torch.argsort(prints[rows], stable=True)]
    position = torch.zeros(len(prints), dtype=torch.float64, device=prints.device)
    position[rows] = inputs.relative_peak[rows.roll(-1)].double()
    last = _step_at(position, inputs.n_steps) if len(rows) > 1 else torch.full_like(inputs.peak, -1)
    return inputs.tokens_of_steps(inputs.start, last)


def _step_at(position: Tensor, n_steps: Tensor) -> Tensor:
    """The step at relative position ``position``, in [0, 1), of each response."""
    return torch.minimum((position * n_steps).long(), (n_steps - 1).clamp(min=0))
