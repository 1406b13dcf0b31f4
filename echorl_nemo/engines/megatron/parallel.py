"""The process groups of a run, and how host-side data crosses them."""

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
    """This rank's place: `tensor` x `pipeline` ranks hold one replica of the policy, `data` replicas share a step."""

    device: torch.device
    tensor_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """The ranks of this replica."""
    data_group: dist.ProcessGroup
    """The ranks that hold the same weights."""
    host_group: dist.ProcessGroup
    """All ranks, over gloo, for what lives in host memory."""
    data_host_group: dist.ProcessGroup
    """The ranks of `data_group`, over gloo."""
    source: int
    """Global rank, in this replica, of the last pipeline stage's first tensor rank: it has the logits."""
    data_rank: int
    data_size: int
    in_step: bool
    """Whether replicas share the experts of a mixture, so that each forward of one is a forward of all."""
    first_stage: bool
    last_stage: bool

    @property
    def main(self) -> bool:
        """True on the one rank that writes files and talks to people."""
        return dist.get_rank() == 0

    def broadcast_from_last_stage(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``value`` of `source` on every rank of the replica; ``value`` is not read elsewhere."""
        if dist.get_rank() == self.source:
            assert value is not None
            tensor = value.to(dtype).contiguous()
        else:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        dist.broadcast(tensor, src=self.source, group=self.model_group)
        return tensor

    def share_objects(self, mine: Sequence[Any]) -> list[Any]:
        """The concatenation, in rank order, of what each rank of the run gives."""
        gathered: list[Any] = [None] * dist.get_world_size(self.host_group)
        dist.all_gather_object(gathered, list(mine), group=self.host_group)
        return [item for part in gathered for item in part]

    def of_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the main rank, which alone calls it. An error that names its remedy, or of the file
        system, is raised on every rank."""
        answers: list[tuple[Any, str]] = []
        if self.main:
            try:
                answers = [(work(), "")]
            except (UserError, OSError) as error:
                answers = [(None, str(error))]
        [(value, failure)] = self.share_objects(answers)
        if failure:
            raise SharedError(failure)
        result: T = value
        return result

    def barrier(self) -> None:
        """Wait for every rank of the run."""
        dist.barrier(group=self.host_group)

    def share_over_replicas(self, mine: Any) -> list[Any]:
        """What each replica gives, in their order. All ranks of a replica give the same, so that every rank asks only
        its like in the other replicas."""
        gathered: list[Any] = [None] * self.data_size
        dist.all_gather_object(gathered, mine, group=self.data_host_group)
        return gathered

    def most_of_replicas(self, mine: int) -> int:
        """The largest of what the replicas give, where they have to stay in step; else ``mine``."""
        return max(self.share_over_replicas(mine)) if self.in_step else mine

    def share_rollouts(self, mine: RolloutBatch | None) -> RolloutBatch:
        """The rollouts of all replicas, in their order; ``mine`` is None where a replica has none."""
        return concatenate([part for part in self.share_over_replicas(mine) if part is not None])

    def my_share(self, count: int) -> range:
        """This replica's stretch of ``count`` things; the first replicas get one more where it does not divide."""
        share, rest = divmod(count, self.data_size)
        start = self.data_rank * share + min(self.data_rank, rest)
        return range(start, start + share + (self.data_rank < rest))


def initialize(platform: Platform, layout: ParallelConfig, *, seed: int, timeout_minutes: int) -> Parallel:
    """Form the process groups. torch.distributed must be initialised already."""
    device = platform.device()
    timeout = timedelta(minutes=timeout_minutes)
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        expert_model_parallel_size=layout.expert,
        # whole experts where they are spread: thinner ones would be worse products
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
    source = dist.get_process_group_ranks(model_group)[[int(flag) for flag in flags].index(1)]
    return Parallel(
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        model_group=model_group,
        data_group=parallel_state.get_data_parallel_group(),
        host_group=dist.new_group(backend="gloo", timeout=timeout),
        data_host_group=parallel_state.get_data_parallel_group_gloo(),
        source=source,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        in_step=layout.expert > 1 and parallel_state.get_data_parallel_world_size() > 1,
        first_stage=first,
        last_stage=last,
    )
