"""Output of a run on the terminal: a line for each step, a progress bar, a summary at the end."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PHASES = ("generate", "verify", "score", "update")


def step_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One line about a step from its metrics, ``values``; ``step`` counts from 0. A skipped step has no metrics of an
    update, which are shown as nan."""
    values = defaultdict(lambda: math.nan, values)
    parts = [
        f"step {step + 1}/{steps}{' SKIPPED' if values.get('skipped') else ''}",
        f"reward {values['reward']:.3f}",
        f"all-one {values['all_one']:.2f} all-zero {values['all_zero']:.2f}",
        f"truncated {values['truncated']:.2f} length {values['response_length']:.0f}",
    ]
    if "echorl.clips" in values:
        parts.append(
            f"clips {values['echorl.clips']:.0f} share {values['echorl.clip_share']:.2f} "
            f"stop {values['echorl.stop_coverage']:.2f} peak {values['echorl.relative_peak']:.2f} "
            f"loss {values['clip_loss']:.3f}"
        )
    if values.get("verify.failures"):
        parts.append(
            f"{values['verify.failures']:.0f} verifier failures, {values['verify.timeouts']:.0f} out of time, see "
            "verifier_failures.jsonl"
        )
    parts.append(f"entropy {values['entropy']:.4f} grad {values['grad_norm']:.3g}")
    split = " ".join(f"{phase} {values[f'time.{phase}']:.1f}" for phase in PHASES)
    parts.append(f"{values['tokens_per_second']:.0f} tok/s, {split} s")
    return " | ".join(parts)


class RunConsole:
    """Prints step lines; on a terminal with a progress bar below them."""

    def __init__(self, steps: int, *, first_step: int, progress: bool) -> None:
        # soft wrap: in a log file, lines must not be cut at 80 columns
        self.console = Console(soft_wrap=True, highlight=False)
        self.steps = steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (progress and self.console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=steps, completed=first_step)

    def start(self) -> None:
        """Show the progress bar."""
        self._progress.start()

    def stop(self) -> None:
        """Remove the progress bar."""
        self._progress.stop()

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Print the line of a step and move the progress bar on."""
        self.print(step_line(step, self.steps, values))
        self._progress.update(self._task, completed=step + 1)

    def evaluation(self, values: dict[str, float]) -> None:
        """Print the line of an evaluation."""
        self.print(
            f"held-out accuracy {values['eval.accuracy']:.3f} | length {values['eval.response_length']:.0f} | "
            f"truncated {values['eval.truncated']:.2f}"
        )

    def summary(self, metrics: Sequence[dict[str, Any]], folder: Path) -> None:
        """Print a table of the run's first and last metrics, and the list of its files."""
        table = Table("", "first", "last", title="EchoRL run")
        for label, name, width in (
            ("held-out accuracy", "eval.accuracy", 1),
            ("reward", "reward", 3),
            ("all-correct groups", "all_one", 3),
            ("all-wrong groups", "all_zero", 3),
            ("entropy, nats", "entropy", 3),
            ("response tokens", "response_length", 3),
            ("clip share", "echorl.clip_share", 3),
        ):
            values = [row[name] for row in metrics if name in row]
            if values:
                first, last = values[:width], values[-width:]
                table.add_row(label, f"{sum(first) / len(first):.3f}", f"{sum(last) / len(last):.3f}")
        self.console.print(table)
        self.print("means of the first and last 3 steps; accuracy before and after training")
        for path in sorted(folder.iterdir()):
            self.print(f"  {path}{'/' if path.is_dir() else ''}")
