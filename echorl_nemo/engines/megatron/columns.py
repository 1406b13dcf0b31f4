"""The columns of a step: what every rank knows of all its rollouts, a value or a few for each.

Shapes: N rollouts of all ranks, n of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.echo.rows import Rows
from echorl_nemo.rollout.batch import RolloutBatch


@dataclass(frozen=True)
class Columns:
    """Columns of the rollouts of all ranks, in the order of the ranks."""

    group_ids: Tensor
    """[N] int64."""
    rewards: Tensor
    """[N] float32: of the deciding verifier."""
    finished: Tensor
    """[N] bool."""
    sampled: Tensor
    """[N] bool: the rollouts that the policy sampled, all but an expert's."""
    response_lengths: Tensor
    """[N] int64, tokens."""
    reward_parts: dict[str, Tensor]
    """[N] float32 of each verifier, by its name."""

    def select(self, rows: Tensor) -> "Columns":
        """The columns of the rollouts ``rows``, indices or [N] bool."""
        parts = {name: part[rows] for name, part in self.reward_parts.items()}
        names = [spec.name for spec in fields(self) if spec.name != "reward_parts"]
        return Columns(**{name: getattr(self, name)[rows] for name in names}, reward_parts=parts)


def gather_columns(batch: RolloutBatch, group: dist.ProcessGroup | None) -> Columns:
    """The columns of verified rollouts. ``group``: the ranks that hold the step's other rollouts; None if there are
    none. Each of them must call this."""
    assert batch.rewards is not None
    rows = Rows(len(batch), torch.device("cpu"), group)
    return Columns(
        group_ids=rows.gather(batch.group_ids),
        rewards=rows.gather(batch.rewards),
        finished=rows.gather(batch.finished),
        sampled=rows.gather(batch.sampled),
        response_lengths=rows.gather(batch.response_lengths),
        reward_parts={name: rows.gather(part) for name, part in batch.reward_parts.items()},
    )


def join_columns(parts: Sequence[Columns]) -> Columns:
    """The columns of several rounds of rollouts, one after the other."""
    names = [spec.name for spec in fields(Columns) if spec.name != "reward_parts"]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    rewards = {name: torch.cat([part.reward_parts[name] for part in parts]) for name in parts[0].reward_parts}
    return Columns(**joined, reward_parts=rewards)
