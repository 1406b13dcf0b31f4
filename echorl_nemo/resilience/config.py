"""Configuration of checkpoints, and of how a run reacts to failures."""

from dataclasses import dataclass

from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import check_fields, number


@dataclass(kw_only=True)
class CheckpointConfig:
    """Which checkpoints are kept, and how they are written. `trainer.save_every` sets when."""

    keep_last: int = number(2, "[1, 1000000]", "a run goes on from the newest")
    """Number of newest checkpoints that are kept. With 1 there is none to fall back on if it is damaged."""

    keep_best: int = number(1, "[0, 1000000]", "0 is off")
    """Number of checkpoints with the highest `eval.accuracy` that are kept too, among steps that were evaluated."""

    keep_every: int = number(0, "[0, 1000000000]", "0 is off")
    """Checkpoints whose step is a multiple of this are never removed; 0 is off."""

    asynchronous: bool = False
    """Write in a forked process while training goes on. This takes host memory for what the rank writes, and the
    checkpoint is complete some steps later."""

    low_memory: bool = False
    """Collect the optimizer's state on one replica, over gloo. False collects it on every replica, and the replicas
    share the writing: faster, with 12 bytes of host memory for each parameter of a rank's shard (on a GPU 4 at a
    time)."""

    accept_changed_data: bool = False
    """Go on from a checkpoint although `data.train` holds other prompts than when it was saved."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint", error=UserError)


@dataclass(kw_only=True)
class ResilienceConfig:
    """When a run gives up, warns, or stops before its job ends."""

    max_skipped_steps: int = number(3, "[0, 1000000000]")
    """Steps in a row that may be skipped because loss, gradient norm or rewards were not finite; one more stops the
    run."""

    step_limit_minutes: float = number(60.0, "[0, 1000000]", "0 is off")
    """If a step takes longer every rank writes its stacks to `run_dir`/stacks; 0 is off. A run that hangs is ended by
    `trainer.timeout_minutes`."""

    time_limit_minutes: float = number(0.0, "[0, 1000000]", "0 is off")
    """Length of the job, from SLURM_JOB_START_TIME if that is set, otherwise from the start of the ranks. The run saves
    before this and ends with exit code 75. 0: the limit is SLURM_JOB_END_TIME, and none without it."""

    time_margin_minutes: float = number(2.0, "[0, 1000000]")
    """Time that is kept free before the limit, added to 1.5 times the longest step and 2 times the longest save so
    far."""

    def __post_init__(self) -> None:
        check_fields(self, "resilience", error=UserError)
