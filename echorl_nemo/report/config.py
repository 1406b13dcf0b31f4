"""Configuration of what a run records, and the names of its files."""

from dataclasses import dataclass

from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import check_fields, number

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
FAILURES_FILE = "verifier_failures.jsonl"
REPORT_FILE = "report.html"
"""Names of the files of a run folder."""


@dataclass(kw_only=True)
class LoggerConfig:
    """Records of a run beside its metrics file: TensorBoard, W&B, MLflow, rollouts, progress bar."""

    tensorboard: bool = True
    """Write TensorBoard events to `run_dir`/tensorboard."""

    wandb_project: str | None = None
    """Project of Weights & Biases to log to (needs the package wandb); null is off."""

    mlflow_experiment: str | None = None
    """Experiment of MLflow to log to (needs the package mlflow); null is off."""

    rollouts_every: int = number(10, "[1, 1000000000]")
    """Rollouts are recorded every this many steps, and always at the first and the last step."""

    groups: int = number(4, "[0, 1000000]")
    """Number of groups that are recorded then, with all their rollouts."""

    progress: bool = True
    """Show a progress bar, on a terminal."""

    def __post_init__(self) -> None:
        check_fields(self, "logger", error=UserError)

    def keeps_rollouts(self, step: int, *, last: bool) -> bool:
        """Whether the rollouts of a step, from 0, are recorded."""
        return last or step % self.rollouts_every == 0
