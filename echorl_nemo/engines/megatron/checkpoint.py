"""Checkpoints of a run: weights, optimizer, learning-rate schedule and step, through Megatron's dist_checkpointing.

Prompts and sampling depend on the seed and on how many prompts were asked, so that nothing else has to be saved.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from echorl_nemo.engines.megatron.model import PolicyModel
from echorl_nemo.engines.megatron.policy import MegatronPolicy

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Loads at another parallel layout."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Training steps made."""
    position: int
    """Prompts asked."""


def save(folder: Path, policy: MegatronPolicy, progress: Progress) -> Path:
    """Write ``folder``/step-NNNNNN; it appears under that name only once it is complete."""
    final = folder / f"step-{progress.step:06d}"
    partial = folder / f"{final.name}.partial"
    if policy.parallel.main:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=policy.parallel.host_group)
    dist_checkpointing.save(_state(policy, progress, loading=False), str(partial))
    dist.barrier(group=policy.parallel.host_group)
    if policy.parallel.main:
        partial.rename(final)
    dist.barrier(group=policy.parallel.host_group)
    return final


def load(checkpoint: Path, policy: MegatronPolicy) -> Progress:
    """Restore ``policy``; returns how far it had come."""
    state = dist_checkpointing.load(_state(policy, Progress(0, 0), loading=True), str(checkpoint))
    policy.model.module.load_state_dict(state["model"])
    policy.optimizer.load_state_dict(state["optimizer"])
    policy.scheduler.load_state_dict(state["scheduler"])
    return Progress(int(state["step"]), int(state["position"]))


def load_weights(checkpoint: Path, model: PolicyModel) -> None:
    """Load the weights alone into ``model``, without an optimizer."""
    state = dist_checkpointing.load({"model": model.module.sharded_state_dict()}, str(checkpoint))
    model.module.load_state_dict(state["model"])


def _state(policy: MegatronPolicy, progress: Progress, *, loading: bool) -> dict[str, Any]:
    model = policy.model.module.sharded_state_dict()
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=OPTIMIZER_FORMAT),
        "scheduler": policy.scheduler.state_dict(),
        "step": progress.step,
        "position": progress.position,
    }
