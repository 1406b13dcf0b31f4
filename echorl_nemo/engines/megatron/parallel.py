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
from echorl_nemo.rollout.batch import RolloutBatch, concatenate
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
    """The ranks of `replica_group`, over gloo."""
    last_stage_rank: int
    """Global rank of the first tensor-parallel rank on this replica's last pipeline stage, which has the logits."""
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    replica_rank: int
    replica_size: int
    lockstep: bool
    """Whether replicas share the experts of a mixture, so that all must run every forward together."""
    is_first_stage: bool
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """Whether this is the main rank, rank 0, which writes the files and prints."""
        return dist.get_rank() == 0

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

    def all_gather_over_replicas(self, mine: Any) -> list[Any]:
        """The objects of all replicas in one list, in their order. All ranks of a replica must pass the same object."""
        gathered: list[Any] = [None] * self.replica_size
        dist.all_gather_object(gathered, mine, group=self.replica_host_group)
        return gathered

    def max_over_replicas(self, mine: int) -> int:
        """The largest number of all replicas if `lockstep` is set; otherwise ``mine``, without communication."""
        return max(self.all_gather_over_replicas(mine)) if self.lockstep else mine

    def gather_rollouts(self, mine: RolloutBatch | None) -> RolloutBatch:
        """The rollouts of all replicas in one batch, in their order. A replica without rollouts passes None."""
        return concatenate([part for part in self.all_gather_over_replicas(mine) if part is not None])

    def replica_shard(self, count: int) -> range:
        """The indices of this replica's part of ``count`` items. The parts are consecutive; if ``count`` does not
        divide, the first replicas have one item more."""
        return _shard(count, self.replica_rank, self.replica_size)

    def data_shard(self, count: int) -> range:
        """As `replica_shard`, but the ranks of a context group have the same part."""
        return _shard(count, self.data_rank, self.data_size)


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
        last_stage_rank=last_stage_rank,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        replica_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        replica_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        lockstep=layout.expert > 1 and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1,
        is_first_stage=first,
        is_last_stage=last,
    )
