"""Experiment trackers. Each uses its own library, which is imported only if the configuration asks for it."""

from pathlib import Path
from typing import Any, Protocol

from echorl_nemo.ops.registry import Registry
from echorl_nemo.report.config import LoggerConfig


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a training step, from 0; -1 is before the first."""
        ...

    def close(self) -> None:
        """Write out what is left, and end the tracker's run."""
        ...


class TensorBoard:
    """Writes TensorBoard events to the run folder."""

    def __init__(self, folder: Path, enabled: bool, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to a run of Weights & Biases named after the run folder. A resumed run continues it."""

    def __init__(self, folder: Path, project: str, *, first_step: int) -> None:
        import wandb

        name = folder.resolve().name
        self._run: Any = wandb.init(project=project, name=name, id=name, resume="allow", dir=str(folder))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step + 1)  # its steps start at 0, ours at -1

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Logs to a run of MLflow named after the run folder, which keeps its id. A resumed run continues it."""

    def __init__(self, folder: Path, experiment: str, *, first_step: int) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(experiment)
        kept = folder / "mlflow_run_id"
        run_id = kept.read_text(encoding="utf-8") if kept.is_file() else None
        run = mlflow.start_run(run_id=run_id, run_name=folder.resolve().name)
        kept.write_text(run.info.run_id, encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step + 1)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS = Registry(
    "logger",
    {
        "tensorboard": "echorl_nemo.report.trackers:TensorBoard",
        "wandb_project": "echorl_nemo.report.trackers:WeightsAndBiases",
        "mlflow_experiment": "echorl_nemo.report.trackers:MLflow",
    },
)
"""Trackers by the key of `logger` that turns them on."""


def make_trackers(folder: Path, config: LoggerConfig, *, first_step: int) -> list[Tracker]:
    """Create the trackers that ``config`` asks for. ``first_step``: where the run starts, or goes on."""
    values = {key: getattr(config, key) for key in TRACKERS}
    return [
        TRACKERS.load(key)(folder, value, first_step=first_step)
        for key, value in values.items()
        if value not in (None, False)
    ]
