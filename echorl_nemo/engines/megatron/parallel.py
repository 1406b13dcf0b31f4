"""The process groups of a run, and collectives for data in host memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.errors import SharedError, UserError
from echorl_nemo.rollout.batch import RolloutBatch, concatenate, in_order, rows_of_groups
from echorl_nemo.rollout.exchange import broadcast_bytes, exchange_bytes, pack_rollouts, unpack_rollouts
from echorl_nemo.schema import ParallelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """This rank's process groups and its place in them: `tensor` x `pipeline` ranks hold one replica of the policy, and
    there are `context` x `data` replicas. In generation each replica has rollouts of its own; in scoring and training
    the `context` replicas that differ only in that rank share the positions of the same rollouts."""

    device: torch.device
    tensor_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """The ranks of this replica."""
    context_group: dist.ProcessGroup
    """The ranks that hold the same weights and share the positions of the same rollouts."""
    data_group: dist.ProcessGroup
    """The ranks that hold the same weights and the same positions of other rollouts."""
    replica_group: dist.ProcessGroup
    """The ranks that hold the same weights: `context` x `data`."""
    host_group: dist.ProcessGroup
    """All ranks, over gloo, for data in host memory."""
    replica_host_group: dist.ProcessGroup
    """The ranks of `replica_group`, over gloo. The place of each is data_rank x context_size + context_rank."""
    data_host_group: dist.ProcessGroup
    """The ranks of `data_group`, over gloo."""
    share_host_group: dist.ProcessGroup
    """The ranks that hold the same rollouts, over gloo: `tensor` x `pipeline` x `context` of them. The first one sends
    and receives rollouts for all."""
    last_stage_rank: int
    """Global rank of the first tensor-parallel rank on this replica's last pipeline stage, which has the logits."""
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    replica_size: int
    lockstep: bool
    """Whether replicas share the experts of a mixture, so that all must run every forward together."""
    is_first_stage: bool
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """Whether this is the main rank, rank 0, which writes the files and prints."""
        return dist.get_rank() == 0

    @property
    def rows_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the other rollouts of a step, over gloo; None if this rank holds them all."""
        return self.data_host_group if self.data_size > 1 else None

    @property
    def share_rank(self) -> int:
        """This rank's place among those that hold the same rollouts."""
        return dist.get_rank(self.share_host_group)

    @property
    def share_size(self) -> int:
        """Number of ranks that hold the same rollouts."""
        return dist.get_world_size(self.share_host_group)

    def broadcast_from_last_stage(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Send ``value`` from `last_stage_rank` to every rank of the replica, and return it. Other ranks pass None."""
        if dist.get_rank() == self.last_stage_rank:
            assert value is not None
            tensor = value.to(dtype).contiguous()
        else:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        dist.broadcast(tensor, src=self.last_stage_rank, group=self.model_group)
        return tensor

    def all_gather_objects(self, mine: Sequence[Any]) -> list[Any]:
        """The objects of all ranks of the run in one list, in rank order. Every rank must call this."""
        gathered: list[Any] = [None] * dist.get_world_size(self.host_group)
        dist.all_gather_object(gathered, list(mine), group=self.host_group)
        return [item for part in gathered for item in part]

    def run_on_main_rank(self, work: Callable[[], T]) -> T:
        """Call ``work`` on the main rank only, and return its result on every rank. Every rank must call this.

        Raises SharedError on every rank if ``work`` raises UserError or OSError.
        """
        answers: list[tuple[Any, str]] = []
        if self.is_main:
            try:
                answers = [(work(), "")]
            except (UserError, OSError) as error:
                answers = [(None, str(error))]
        [(value, failure)] = self.all_gather_objects(answers)
        if failure:
            raise SharedError(failure)
        result: T = value
        return result

    def barrier(self) -> None:
        """Wait until every rank of the run calls this."""
        dist.barrier(group=self.host_group)

    def max_over_replicas(self, mine: int) -> int:
        """The largest number of all replicas if `lockstep` is set; otherwise ``mine``, without communication."""
        if not self.lockstep:
            return mine
        largest = torch.tensor([mine])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.replica_host_group)
        return int(largest)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks that hold the other rollouts."""
        if self.data_size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.data_host_group)
        result: list[float] = total.tolist()
        return result

    def gather_objects_on_main(self, mine: Sequence[Any]) -> list[Any]:
        """On the main rank the objects of all rollouts, in their order; an empty list on others. All ranks that hold
        the same rollouts must pass the same objects, of which one is sent."""
        gathered: list[Any] | None = [None] * dist.get_world_size(self.host_group) if self.is_main else None
        own = list(mine) if self.share_rank == 0 else []
        dist.gather_object((self.data_rank, own), gathered, dst=0, group=self.host_group)
        by_rank = sorted(gathered or [], key=lambda part: part[0])
        return [item for _, part in by_rank for item in part]

    def data_shard(self, count: int) -> range:
        """The indices of this rank's part of ``count`` groups of rollouts. The parts are consecutive; if ``count`` does
        not divide, the first have one more. All ranks of `share_host_group` have the same part."""
        return _shard(count, self.data_rank, self.data_size)

    def generation_shard(self, count: int) -> range:
        """The indices of this replica's part of ``count`` groups: the ranks of a context group divide their
        `data_shard` among them."""
        whole = self.data_shard(count)
        own = _shard(len(whole), self.context_rank, self.context_size)
        return range(whole.start + own.start, whole.start + own.stop)

    def exchange_rollouts(self, held: RolloutBatch | None, groups: Sequence[int]) -> RolloutBatch:
        """Send every rollout to the ranks that train on its group. Returns this rank's, in the order of ``groups``.

        ``held``: the rollouts that this replica holds; None if it holds none and does not know their fields.
        ``groups``: the ids of all groups to train on, in their order, the same on every rank; `data_shard` divides
        them. Other rollouts are dropped.

        Only the first rank of each replica sends, to the first of each `share_host_group`, which passes them on.
        """
        mine: RolloutBatch | None = None
        if dist.get_rank(self.model_group) == 0:
            received = self._exchange(held, groups)
            mine = in_order(received, groups) if self.context_rank == 0 else None
        return self._broadcast_in_share(mine)

    def _exchange(self, held: RolloutBatch | None, groups: Sequence[int]) -> list[RolloutBatch]:
        """The parts of this rank's rollouts that the first ranks of all replicas hold."""
        parts = [b""] * self.data_size
        own: RolloutBatch | None = None
        if held is not None:
            for data_rank in range(self.data_size):
                wanted = [groups[i] for i in _shard(len(groups), data_rank, self.data_size)]
                part = held.select(rows_of_groups(held, wanted))
                if data_rank == self.data_rank and self.context_rank == 0:
                    own = part
                else:
                    parts[data_rank] = pack_rollouts(part)
        blobs = exchange_bytes(parts, self.replica_host_group, self._first_of_each_share())
        return [batch for batch in (own, *map(unpack_rollouts, blobs)) if batch is not None]

    def _first_of_each_share(self) -> list[int]:
        """The places in `replica_host_group` of the ranks that send and receive rollouts."""
        return [data_rank * self.context_size for data_rank in range(self.data_size)]

    def _broadcast_in_share(self, mine: RolloutBatch | None) -> RolloutBatch:
        if self.share_size == 1:
            assert mine is not None
            return mine
        data = broadcast_bytes(pack_rollouts(mine) if self.share_rank == 0 else None, self.share_host_group)
        if self.share_rank == 0:
            assert mine is not None
            return mine
        return unpack_rollouts(data)

    def gather_on_main(self, mine: RolloutBatch) -> RolloutBatch | None:
        """On the main rank the rollouts of all ranks, in their order; None on others. Meant for few rollouts: the main
        rank must have memory for all of them."""
        if dist.get_rank(self.model_group) != 0:
            return None
        parts = [b""] * self.data_size
        if self.context_rank == 0 and not self.is_main:
            parts[0] = pack_rollouts(mine)
        blobs = exchange_bytes(parts, self.replica_host_group, self._first_of_each_share())
        return concatenate([mine, *map(unpack_rollouts, blobs)]) if self.is_main else None


def _shard(count: int, rank: int, size: int) -> range:
    share, rest = divmod(count, size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def initialize(platform: Platform, layout: ParallelConfig, *, seed: int, timeout_minutes: int) -> Parallel:
    """Create the process groups of a run. torch.distributed must be initialised already."""
    device = platform.device()
    timeout = timedelta(minutes=timeout_minutes)
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        # experts that are spread over ranks are not split again: small matrix products are slow
        expert_tensor_parallel_size=1 if layout.expert > 1 else None,
        distributed_timeout_minutes=timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    model_group = parallel_state.get_model_parallel_group()
    is_source = torch.tensor([int(last and parallel_state.get_tensor_model_parallel_rank() == 0)], device=device)
    flags = [torch.empty_like(is_source) for _ in range(dist.get_world_size(model_group))]
    dist.all_gather(flags, is_source, group=model_group)
    last_stage_rank = dist.get_process_group_ranks(model_group)[[int(flag) for flag in flags].index(1)]
    return Parallel(
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        model_group=model_group,
        context_group=parallel_state.get_context_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        host_group=dist.new_group(backend="gloo", timeout=timeout),
        replica_host_group=parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
        data_host_group=parallel_state.get_data_parallel_group_gloo(with_context_parallel=False),
        share_host_group=_share_group(timeout),
        last_stage_rank=last_stage_rank,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        replica_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        lockstep=layout.expert > 1 and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1,
        is_first_stage=first,
        is_last_stage=last,
    )


def _share_group(timeout: timedelta) -> dist.ProcessGroup:
    """The ranks with this rank's data-parallel rank, over gloo."""
    own = torch.tensor([parallel_state.get_data_parallel_rank()])
    ranks = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    everyone = dist.new_group(backend="gloo", timeout=timeout)
    dist.all_gather(ranks, own, group=everyone)
    groups = {}
    for data_rank in range(parallel_state.get_data_parallel_world_size()):  # every rank must create every group
        members = [rank for rank, of in enumerate(ranks) if int(of) == data_rank]
        groups[data_rank] = dist.new_group(members, backend="gloo", timeout=timeout)
    return groups[int(own)]
