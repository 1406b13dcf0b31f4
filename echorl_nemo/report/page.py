"""Writes report.html: one static file with the curves of one or more runs and a browser for their rollouts."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment
from matplotlib.figure import Figure

from echorl_nemo.errors import UserError
from echorl_nemo.report.config import CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE
from echorl_nemo.report.diagnosis import WINDOW, run_warnings, stop_bias_warning
from echorl_nemo.report.logger import read_lines, replace_nonfinite
from echorl_nemo.resilience.disk import is_full

TEMPLATE = Path(__file__).with_name("template.html")

CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("reward", {"reward": "training rollouts", "eval.accuracy": "held-out accuracy"}),
    ("share of groups", {"all_one": "all correct", "all_zero": "all wrong"}),
    ("entropy, nats", {"entropy": "mean over response tokens"}),
    (
        "EchoClips",
        {
            "echorl.clip_share": "share of the response",
            "echorl.stop_coverage": "stop coverage",
            "echorl.relative_peak": "relative peak position",
        },
    ),
    ("response tokens", {"response_length": "mean"}),
    ("gradient norm", {"grad_norm": "before clipping"}),
)
"""Title of each chart, with its metrics and their labels."""

FULL_SHADE_NATS = 1.5
"""Entropy at which a token has the full shade."""

BINS = 10

Run = tuple[str, list[dict[str, Any]]]
"""(name, lines of a file of the run folder)."""


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the report of the runs in ``folders`` to ``path``. Raises UserError if a folder has no metrics."""
    names = _names(folders)
    metrics: list[Run] = []
    for name, folder in zip(names, folders, strict=True):
        rows = [row for row in read_lines(folder / METRICS_FILE) if isinstance(row.get("step"), int)]
        if not rows:
            raise UserError(f"{folder / METRICS_FILE}: it has no metrics; name the folder of a run")
        metrics.append((name, rows))
    rollouts = [(name, _whole_rollouts(folder)) for name, folder in zip(names, folders, strict=True)]
    configs = [(name, _config_text(folder)) for name, folder in zip(names, folders, strict=True)]
    groups = [
        group
        for (name, records), (_, config) in zip(rollouts, configs, strict=True)
        for group in group_records(
            name, records, success_reward=_setting(config, "success_reward", 1.0), reduction=_reduction(config)
        )
    ]
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        names=names,
        warnings=[f"{name}: {warning}" for name, rows in metrics for warning in _warnings(rows)],
        charts=[_chart(title, series, metrics) for title, series in CURVES]
        + _peak_charts(rollouts, [_reduction(config) for _, config in configs]),
        # "<" would let a rollout's text end the script element
        data=json.dumps(replace_nonfinite(groups), ensure_ascii=False).replace("<", "\\u003c"),
        shade=FULL_SHADE_NATS,
        configs=configs,
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"{path}: the report cannot be written ({error.strerror}); name another file") from error


def _whole_rollouts(folder: Path) -> list[dict[str, Any]]:
    """The recorded rollouts of a run that have all fields which the page shows."""
    needed = {"step", "group", "prompt", "reward", "tokens", "entropies", "steps", "clip", "finished"}
    return [row for row in read_lines(folder / ROLLOUTS_FILE) if needed <= row.keys()]


def _config_text(folder: Path) -> str:
    """The configuration of a run as YAML text; empty if there is none that can be read."""
    path = folder / CONFIG_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        return text if isinstance(yaml.safe_load(text), dict) else ""
    except yaml.YAMLError:
        return ""


def group_records(
    run: str, records: Sequence[dict[str, Any]], *, success_reward: float = 1.0, reduction: str = "mean"
) -> list[dict[str, Any]]:
    """The recorded rollouts of a run by group. Each group is a dictionary: `pattern` (all right, mixed, all wrong),
    `marks` (how many rewards are at least ``success_reward``, an expert's not counted), `reduction`
    (`echorl.step_reduction`), `peak` (highest step entropy, nats), and the rollouts."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in records:
        rollout = {**record, "clip": record["clip"] or [0] * len(record["tokens"])}
        groups.setdefault((record["step"], record["group"]), []).append(rollout)
    made = []
    for (step, _), rollouts in groups.items():
        own = [rollout for rollout in rollouts if not rollout.get("expert")]
        right = sum((rollout["reward"] or 0.0) >= success_reward for rollout in own)
        pattern = "all right" if right == len(own) else "mixed" if right else "all wrong"
        peak = max((max(_step_entropies(rollout, reduction), default=0.0) for rollout in rollouts), default=0.0)
        marks = f"{right} of {len(own)} right"
        made.append(
            {"run": run, "step": step, "pattern": pattern, "marks": marks, "reduction": reduction, "peak": peak,
             "rollouts": rollouts}
        )  # fmt: skip
    return made


def _setting(config: str, name: str, default: Any) -> Any:
    """The value of `echorl.NAME` in a run's configuration text; ``default`` if it has none."""
    return ((yaml.safe_load(config) or {}).get("echorl") or {}).get(name, default)


def _reduction(config: str) -> str:
    return str(_setting(config, "step_reduction", "mean"))


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders; their paths if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    steps = [row for row in rows if "response_length" in row]
    stop_bias = stop_bias_warning(steps[: len(steps) // WINDOW * WINDOW])
    return [*run_warnings(steps), *([stop_bias] if stop_bias else [])]


REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "sum": sum,
}
"""Functions from a step's token entropies to its step entropy, by `echorl.step_reduction`."""


def _step_entropies(rollout: dict[str, Any], reduction: str) -> list[float]:
    steps: dict[int, list[float]] = {}
    for entropy, step in zip(rollout["entropies"], rollout["steps"], strict=True):
        steps.setdefault(step, []).append(entropy or 0.0)  # null stands for a number that is not finite
    return [REDUCTIONS[reduction](values) for values in steps.values()]


def _chart(title: str, series: dict[str, str], runs: Sequence[Run]) -> str:
    """A chart of metrics over steps. With one run each metric has a colour; with several each run has a colour, and
    each metric a line style."""
    figure, axes = _figure(title, "step")
    for number, (run, rows) in enumerate(runs):
        for order, (name, label) in enumerate(series.items()):
            points = [(row["step"] + 1, row[name]) for row in rows if name in row]
            if points:
                several = len(runs) > 1
                axes.plot(
                    *zip(*points, strict=True),
                    label=f"{run}: {label}" if several else label,
                    color=f"C{number if several else order}",
                    linestyle=("-", "--", ":")[order] if several else "-",
                    marker="o" if name.startswith("eval") else None,
                )
    return _svg(figure, axes)


def _peak_charts(runs: Sequence[Run], reductions: Sequence[str]) -> list[str]:
    """Two histograms of the recorded responses: the relative position of the peak, and the line that it falls on."""
    position, position_axes = _figure("where peaks lie", "relative position among the response's steps")
    line, line_axes = _figure("on which line peaks fall", "line of the response")
    for (run, records), reduction in zip(runs, reductions, strict=True):
        steps = [found for record in records if (found := _step_entropies(record, reduction))]
        peaks = [(values.index(max(values)), len(values)) for values in steps]
        label = run if len(runs) > 1 else None
        places = [(peak + 0.5) / count for peak, count in peaks]
        position_axes.hist(places, bins=BINS, range=(0, 1), histtype="step", label=label)
        lines = [peak + 1 for peak, _ in peaks]
        line_axes.hist(lines, bins=[n + 0.5 for n in range(max(lines, default=1) + 1)], histtype="step", label=label)
    return [_svg(position, position_axes), _svg(line, line_axes)]


def _figure(title: str, label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure, axes: Any) -> str:
    """A chart as inline SVG. Text is kept as text, in the page's colour."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")
