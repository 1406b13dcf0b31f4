"""Resolves the parallel layout of a run: the sizes that the configuration leaves open, and the number of ranks."""

import torch

from echorl_nemo.engines.megatron.launch import external_world_size
from echorl_nemo.errors import UserError
from echorl_nemo.schema import EvaluateConfig, LayoutConfig, ModelConfig, ParallelConfig, RunConfig


def world_size(config: RunConfig | EvaluateConfig) -> int:
    """Number of ranks of the run. Fills in the sizes that `config.parallel` leaves unset. Raises UserError if torchrun
    or srun started another number of ranks."""
    outer = external_world_size()
    gpus = outer or _gpus_here(config.parallel.device)
    resolve_layout(config.parallel, config.model, gpus, starts_ranks=outer is None)
    layout = config.parallel
    replica = ranks_per_replica(layout)
    if layout.data is None:
        layout.data = 1 if outer is None else max(1, outer // replica)
    world = replica * layout.data
    if outer is not None and outer != world:
        raise UserError(
            f"{outer} ranks were started, but parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} "
            f"x parallel.context={layout.context} x parallel.data={layout.data} is {world}; start {world}, or change "
            "parallel.*"
        )
    return world


def resolve_layout(layout: ParallelConfig, model: ModelConfig, gpus: int, *, starts_ranks: bool) -> None:
    """Replace zeros in ``layout`` by the model's default layout on ``gpus`` GPUs. If this program ``starts_ranks`` the
    number of replicas follows from the GPUs."""
    if layout.tensor and layout.pipeline:
        return
    if layout.tensor or layout.pipeline:
        layout.tensor, layout.pipeline = max(1, layout.tensor), max(1, layout.pipeline)
        return
    fitting = [count for count in model.layouts if count <= gpus]
    default = model.layouts[max(fitting)] if fitting else LayoutConfig()
    layout.tensor, layout.pipeline = default.tensor, default.pipeline
    layout.expert = max(layout.expert, default.expert)
    if layout.data is None and starts_ranks:
        layout.data = max(1, gpus // ranks_per_replica(layout))


def ranks_per_replica(layout: ParallelConfig) -> int:
    """Number of ranks of one data-parallel replica: tensor x pipeline x context."""
    return layout.tensor * layout.pipeline * layout.context


def _gpus_here(device: str) -> int:
    return 1 if device == "cpu" else max(1, torch.cuda.device_count())
