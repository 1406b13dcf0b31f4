"""Spans: the part of a response that is the clip, by `echorl.span`.

Each span is a function from `SpanInputs` to (first step, last step, has clip), each [N]; both steps are inclusive, and
a clip whose first step is after its last is empty. A user's own function has the same form.

Shapes: N rollouts, K steps of the response with the most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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


Span = tuple[Tensor, Tensor, Tensor]
"""(first step, last step, has clip), each [N]."""


def prefix(inputs: SpanInputs) -> Span:
    """From the first token to the end of the peak step: the EchoClip."""
    return inputs.start, inputs.peak, inputs.eligible


def full(inputs: SpanInputs) -> Span:
    """The whole response."""
    return inputs.start, inputs.end, inputs.eligible


def peak_step(inputs: SpanInputs) -> Span:
    """Only the peak step."""
    return inputs.peak, inputs.peak, inputs.eligible


def tail(inputs: SpanInputs) -> Span:
    """Everything after the peak step."""
    return inputs.peak + 1, inputs.end, inputs.eligible


def lowest_prefix(inputs: SpanInputs) -> Span:
    """From the first token to the end of the step with the lowest entropy."""
    lowest = torch.where(inputs.step_lengths > 0, inputs.step_entropies, torch.inf).argmin(dim=1)
    return inputs.start, lowest, inputs.eligible


def random_prefix(inputs: SpanInputs) -> Span:
    """From the first token to the end of a random step, which the seed and the rollout determine."""
    prints = _fingerprint(inputs.step_lengths, inputs.step_entropies, inputs.group_ids)
    return inputs.start, _step_at(_uniform(prints, inputs.seed), inputs.n_steps), inputs.eligible


def shuffled_prefix(inputs: SpanInputs) -> Span:
    """From the first token to the relative peak position of another eligible rollout; no clip if there is none."""
    prints = _fingerprint(inputs.step_lengths, inputs.step_entropies, inputs.group_ids)
    position, has_donor = _position_of_another(inputs.relative_peak, inputs.eligible, prints)
    return inputs.start, _step_at(position, inputs.n_steps), inputs.eligible & has_donor


def _step_at(position: Tensor, n_steps: Tensor) -> Tensor:
    """The step at relative position ``position``, in [0, 1), of each response."""
    return torch.minimum((position * n_steps).long(), (n_steps - 1).clamp(min=0))


def _mix(x: Tensor) -> Tensor:
    """A bijective scramble of int64, the finaliser of splitmix64 (Steele et al., OOPSLA 2014); wraps on overflow."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _fingerprint(lengths: Tensor, step_entropies: Tensor, group_ids: Tensor) -> Tensor:
    """[N] int64: a hash of each rollout that does not depend on its row or rank. It is computed from the group, the
    step lengths and, among rollouts that agree in those, the rank of the peak entropy."""
    steps = torch.arange(1, lengths.shape[1] + 1, device=lengths.device)
    terms = torch.where(lengths > 0, _mix(lengths * 1_000_003 + steps), 0)
    shape = _mix(terms.sum(dim=1) + _mix(group_ids.long()))
    order = torch.argsort(step_entropies.max(dim=1).values, stable=True)
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
