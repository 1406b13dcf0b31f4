"""Starting ranks: under torchrun or srun this process is one of them, else the program starts its own."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.errors import UserError

RankFunction = Callable[[], None]
POLL_SECONDS = 0.1


def outer_world() -> int | None:
    """Ranks started by torchrun or srun, None if this process is on its own."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # a batch script, too, has SLURM_PROCID and SLURM_NTASKS; only a step that srun started has this one
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return tasks if tasks > 1 else None


def launch(function: RankFunction, world: int, platform: Platform, *, timeout_minutes: int) -> int:
    """Run ``function`` on every one of ``world`` ranks with torch.distributed initialised; returns an exit code.

    A rank that fails ends the others: nobody waits for the dead.
    """
    outer = outer_world()
    if outer is not None:
        _adopt_slurm_environment()
        _as_rank(function, platform, "env://", int(os.environ["RANK"]), world, timeout_minutes)
        return 0
    with tempfile.TemporaryDirectory(prefix="echorl-") as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        if world == 1:
            _as_rank(function, platform, rendezvous, 0, 1, timeout_minutes)
            return 0
        platform.check_devices(world)
        context: Any = multiprocessing.get_context(platform.start_method)
        ranks = [
            context.Process(
                target=_child, args=(function, platform, rendezvous, rank, world, timeout_minutes), name=f"rank {rank}"
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            while any(process.is_alive() for process in ranks) and not any(process.exitcode for process in ranks):
                time.sleep(POLL_SECONDS)
            failed = [process for process in ranks if process.exitcode]
        finally:
            for process in ranks:
                if process.is_alive():
                    process.terminate()
            for process in ranks:
                process.join()
        for process in failed:
            if process.exitcode < 0:
                print(f"{process.name} was killed by signal {-process.exitcode}", file=sys.stderr)
        return 1 if failed else 0


def _child(
    function: RankFunction, platform: Platform, rendezvous: str, rank: int, world: int, timeout_minutes: int
) -> None:
    try:
        _as_rank(function, platform, rendezvous, rank, world, timeout_minutes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _as_rank(
    function: RankFunction, platform: Platform, rendezvous: str, rank: int, world: int, timeout_minutes: int
) -> None:
    os.environ.setdefault("LOCAL_RANK", str(rank))
    if platform.backend == "gloo":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    platform.device()
    dist.init_process_group(
        platform.backend,
        init_method=rendezvous,
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=timeout_minutes),
    )
    function()
    dist.destroy_process_group()


def _adopt_slurm_environment() -> None:
    """srun names its variables differently from torchrun."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"{name} is not set: under srun, export MASTER_ADDR (the job's first host) and MASTER_PORT before it"
            )
    for ours, slurms in (
        ("RANK", "SLURM_PROCID"),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        ("LOCAL_RANK", "SLURM_LOCALID"),
    ):
        if ours not in os.environ and slurms in os.environ:
            os.environ[ours] = os.environ[slurms]
