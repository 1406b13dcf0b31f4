"""Random numbers for each rollout that depend on the rollout and a seed, not on its row, rank or batch.

Shapes: N rollouts, K steps of the response with the most.
"""

import torch
from torch import Tensor


def fingerprints(step_lengths: Tensor, step_entropies: Tensor, group_ids: Tensor) -> Tensor:
    """[N] int64: a hash of each rollout that does not depend on its row or rank.

    It is computed from the group [N], the step lengths [N, K] and, among rollouts that agree in those, the rank of the
    highest step entropy.
    """
    steps = torch.arange(1, step_lengths.shape[1] + 1, device=step_lengths.device)
    terms = torch.where(step_lengths > 0, _mix(step_lengths * 1_000_003 + steps), 0)
    shape = _mix(terms.sum(dim=1) + _mix(group_ids.long()))
    order = torch.argsort(step_entropies.max(dim=1).values, stable=True)
    order = order[torch.argsort(shape[order], stable=True)]
    rows = torch.arange(len(order), device=order.device)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = shape[order][1:] != shape[order][:-1]
    place = torch.empty_like(order)
    place[order] = rows - torch.where(new, rows, 0).cummax(dim=0).values if len(order) else rows
    return _mix(shape + _mix(place + 1))


def uniform(fingerprint: Tensor, seed: int) -> Tensor:
    """[N] float64 in [0, 1), fixed by ``fingerprint`` [N] and ``seed``."""
    bits = _mix(fingerprint + _mix(torch.tensor(seed, device=fingerprint.device)))
    return ((bits >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def _mix(x: Tensor) -> Tensor:
    """A bijective scramble of int64, the finaliser of splitmix64 (Steele et al., OOPSLA 2014); wraps on overflow."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
