"""Checkpoints of a run: weights, optimizer, learning-rate schedule and step, through Megatron's dist_checkpointing.

Prompts and sampling depend on the seed and the step alone, so that nothing else has to be saved.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from echorl_nemo.engines.megatron.policy import MegatronPolicy

_NAME = re.compile(r"step-(\d+)")
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Loads at another parallel layout."""


def save(folder: Path, policy: MegatronPolicy, step: int) -> Path:
    """Write ``folder``/step-NNNNNN after ``step`` steps; it appears under that name only once it is complete."""
    final = folder / f"step-{step:06d}"
    partial = folder / f"step-{step:06d}.partial"
    if policy.parallel.main:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=policy.parallel.host_group)
    dist_checkpointing.save(_state(policy, step, loading=False), str(partial))
    dist.barrier(group=policy.parallel.host_group)
    if policy.parallel.main:
        partial.rename(final)
    dist.barrier(group=policy.parallel.host_group)
    return final


def load(checkpoint: Path, policy: MegatronPolicy) -> int:
    """Restore ``policy`` and return the number of steps it had made."""
    state = dist_checkpointing.load(_state(policy, 0, loading=True), str(checkpoint))
    policy.model.module.load_state_dict(state["model"])
    policy.optimizer.load_state_dict(state["optimizer"])
    policy.scheduler.load_state_dict(state["scheduler"])
    return int(state["step"])


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the most steps, None if there is none."""
    complete = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return max(complete, key=lambda path: path.name, default=None)


def _state(policy: MegatronPolicy, step: int, *, loading: bool) -> dict[str, Any]:
    model = policy.model.module.sharded_state_dict()
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=OPTIMIZER_FORMAT),
        "scheduler": policy.scheduler.state_dict(),
        "step": step,
    }
