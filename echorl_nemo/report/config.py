"""What a run writes down."""

from dataclasses import dataclass

from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import check_fields, number

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
FAILURES_FILE = "verifier_failures.jsonl"
REPORT_FILE = "report.html"
"""Files of a run folder."""


@dataclass(kw_only=True)
class LoggerConfig:
    """What a run writes down."""

    tensorboard: bool = True
    """Write TensorBoard events to `run_dir`/tensorboard."""

    wandb_project: str | None = None
    """Project of Weights & Biases to log to (needs the package wandb); null is off."""

    mlflow_experiment: str | None = None
    """Experiment of MLflow to log to (needs the package mlflow); null is off."""

    rollouts_every: int = number(10, "[1, 1000000000]")
    """Steps between those whose rollouts are kept; the first and the last step are always among them."""

    groups: int = number(4, "[0, 1000000]")
    """Groups kept of such a step, with all their rollouts."""

    progress: bool = True
    """Show a progress bar, on a terminal."""

    def __post_init__(self) -> None:
        check_fields(self, "logger", error=UserError)
