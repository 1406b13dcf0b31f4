"""Records a run: writes its files, prints its lines, and writes the report at the end. Only the main rank has one."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from echorl_nemo.report.config import CONFIG_FILE, METRICS_FILE, REPORT_FILE, LoggerConfig
from echorl_nemo.report.console import RunConsole
from echorl_nemo.report.diagnosis import changed_settings, step_warnings, stop_bias_warning
from echorl_nemo.report.logger import RunLogger, ShownRollouts, read_lines
from echorl_nemo.report.page import write_report


class Recorder:
    """Writes to the run folder and to the terminal."""

    def __init__(self, folder: Path, config_yaml: str, config: LoggerConfig, *, steps: int, first_step: int) -> None:
        self.folder, self.steps = folder, steps
        self._stopped = False
        self.logger = RunLogger(folder, config, first_step=first_step)
        before = folder / CONFIG_FILE
        changes = changed_settings(before.read_bytes(), config_yaml) if before.is_file() else []
        before.write_text(config_yaml, encoding="utf-8")
        self.console = RunConsole(steps, first_step=first_step, progress=config.progress)
        self.console.start()
        for change in changes:
            self.console.print(f"since the run's last attempt {change}")
        self._history = [row for row in read_lines(folder / METRICS_FILE) if "reward" in row]

    def evaluation(self, step: int, metrics: dict[str, float], failures: Sequence[dict[str, str]] = ()) -> None:
        """Record an evaluation outside a training step, and the verdicts that were not reached."""
        self.logger.metrics(step, metrics)
        self.logger.failures(step, failures)
        self.console.evaluation(metrics)

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        shown: ShownRollouts | None,
        pieces: Callable[[list[int]], list[str]],
        failures: Sequence[dict[str, str]] = (),
    ) -> None:
        """Record a training step, the rollouts to show if there are some, and the verdicts that were not reached.
        ``pieces`` gives the text of each token. Metrics that are not finite are left out, since JSON has no such
        numbers."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.logger.metrics(step, metrics)
        self.logger.failures(step, failures)
        if shown is not None:
            self.logger.rollouts(step, shown, pieces)
        self.console.step(step, metrics)
        self._history.append(metrics)
        stop_bias = stop_bias_warning(self._history)
        for warning in [*step_warnings(self._history), *([stop_bias] if stop_bias else [])]:
            self.console.print(f"warning: {warning}")
        if "eval.accuracy" in metrics:
            self.console.evaluation(metrics)

    def print(self, text: str) -> None:
        """Print a line on the terminal."""
        self.console.print(text)

    def stop(self) -> None:
        """Close the files and the progress bar. Further calls do nothing."""
        if not self._stopped:
            self._stopped = True
            self.logger.close()
            self.console.stop()

    def finish(self, *, summary: bool) -> None:
        """Close the files, and write the report if there are metrics. With ``summary``, for a run that is complete,
        print a summary."""
        self.stop()
        if not read_lines(self.folder / METRICS_FILE):
            return
        write_report([self.folder], self.folder / REPORT_FILE)
        if summary:
            self.console.summary(read_lines(self.folder / METRICS_FILE), self.folder)
