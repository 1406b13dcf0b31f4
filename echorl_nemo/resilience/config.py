"""Configuration of checkpoints and of what a run does when something breaks."""

from dataclasses import dataclass

from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import check_fields, number


@dataclass(kw_only=True)
class CheckpointConfig:
    """Which checkpoints are kept, and how they are written. When they are is `trainer.save_every`'s."""

    keep_last: int = number(2, "[1, 1000000]", "a run goes on from the newest")
    """Newest checkpoints that are kept; with 1 there is nothing to fall back on."""

    keep_best: int = number(1, "[0, 1000000]", "0 is off")
    """Further ones that are kept: those of the highest `eval.accuracy`, where a step that is saved is evaluated."""

    keep_every: int = number(0, "[0, 1000000000]", "0 is off")
    """Checkpoints of every so many steps are kept for good; 0 is off."""

    asynchronous: bool = False
    """Write in a forked process while training goes on: meanwhile that takes host memory for what the rank writes, and
    the checkpoint is there some steps later."""

    low_memory: bool = False
    """Collect the optimizer's state on one replica, over gloo. False collects it on every replica, which share the
    writing: faster, and for each parameter of a rank's shard 12 bytes of host memory, on a GPU 4 at a time."""

    accept_changed_data: bool = False
    """Go on from a checkpoint although `data.train` holds other prompts than when it was saved."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint", error=UserError)


@dataclass(kw_only=True)
class ResilienceConfig:
    """When a run gives up, warns, or stops in time."""

    max_skipped_steps: int = number(3, "[0, 1000000000]")
    """Steps in a row that may be skipped because loss, gradient norm or rewards were not finite; one more stops the
    run."""

    step_limit_minutes: float = number(60.0, "[0, 1000000]", "0 is off")
    """A step that takes longer makes every rank write its stacks to `run_dir`/stacks; 0 is off. What ends a run that
    hangs is `trainer.timeout_minutes`."""

    time_limit_minutes: float = number(0.0, "[0, 1000000]", "0 is off")
    """Length of the job, from SLURM_JOB_START_TIME where that is set, else from the start of the ranks: the run saves
    and ends with exit code 75 while there is time. 0: the limit is SLURM_JOB_END_TIME, none without it."""

    time_margin_minutes: float = number(2.0, "[0, 1000000]")
    """Kept free before that limit, beside one and a half of the longest step and two of the longest save so far."""

    def __post_init__(self) -> None:
        check_fields(self, "resilience", error=UserError)
