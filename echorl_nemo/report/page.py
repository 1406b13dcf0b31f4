"""report.html: one static file with the run's curves and a few of its rollouts."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.figure import Figure

from echorl_nemo.errors import UserError
from echorl_nemo.report.logger import CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, read_lines

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
"""Title of each chart, and the metrics in it with their labels."""

FULL_SHADE_NATS = 1.5
"""Entropy at which a token's shade is full."""


def write_report(folder: Path, path: Path) -> None:
    """Write the report of the run in ``folder`` to ``path``. Raises UserError if the folder holds no metrics."""
    metrics = read_lines(folder / METRICS_FILE)
    if not metrics:
        raise UserError(f"{folder / METRICS_FILE}: no metrics; is {folder} the folder of a run?")
    config = (folder / CONFIG_FILE).read_text(encoding="utf-8") if (folder / CONFIG_FILE).is_file() else ""
    page = (
        Environment(autoescape=True)
        .from_string(_TEMPLATE)
        .render(
            name=folder.resolve().name,
            steps=max(row["step"] for row in metrics) + 1,
            charts=[_chart(title, series, metrics) for title, series in CURVES],
            rollouts=[_rollout(record) for record in read_lines(folder / ROLLOUTS_FILE)],
            shade=FULL_SHADE_NATS,
            config=config,
        )
    )
    path.write_text(page, encoding="utf-8")


def _chart(title: str, series: dict[str, str], metrics: Sequence[dict[str, Any]]) -> str:
    """One chart as inline SVG; text stays text, and its colour that of the page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for name, label in series.items():
            points = [(row["step"] + 1, row[name]) for row in metrics if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o" if name.startswith("eval") else None)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


def _rollout(record: dict[str, Any]) -> dict[str, Any]:
    """A rollout as its template needs it: tokens in lines, one a step, each with its shade."""
    lines: dict[int, list[dict[str, Any]]] = {}
    clip = record["clip"] or [0] * len(record["tokens"])
    for text, entropy, step, inside in zip(record["tokens"], record["entropies"], record["steps"], clip, strict=True):
        shade = min(1.0, max(0.0, entropy) / FULL_SHADE_NATS)
        shown = text.replace("\n", "⏎")
        lines.setdefault(step, []).append(
            {"text": shown, "entropy": f"{entropy:.3f} nats", "shade": f"{shade:.3f}", "clip": bool(inside)}
        )
    means = {step: sum(_entropies(record, step)) / len(tokens) for step, tokens in lines.items()}
    return {
        **record,
        "lines": [
            {"tokens": tokens, "mean": f"{means[step]:.3f}", "peak": means[step] == max(means.values())}
            for step, tokens in lines.items()
        ],
    }


def _entropies(record: dict[str, Any], step: int) -> list[float]:
    return [entropy for entropy, at in zip(record["entropies"], record["steps"], strict=True) if at == step]


_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>EchoRL run {{ name }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --clip: #0a7d5a; }
@media (prefers-color-scheme: dark) { :root { --clip: #3ddca5; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; }
.charts svg { width: 100%; height: auto; }
.charts svg text { fill: currentColor; }
.rollouts { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }
.rollout { border: 1px solid var(--line); border-radius: 6px; padding: .7rem 1rem; }
.facts { font-size: .85rem; opacity: .8; }
.step { display: flex; justify-content: space-between; font-family: ui-monospace, monospace; }
.step .mean { opacity: .6; font-size: .8rem; }
.step.peak .mean { opacity: 1; font-weight: bold; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
.token { background: rgb(245 130 32 / var(--shade)); padding: 1px; }
.clip { border-bottom: 3px solid var(--clip); }
pre { border: 1px solid var(--line); border-radius: 6px; padding: 1rem; overflow: auto; }
</style>
<h1>EchoRL run {{ name }}, {{ steps }} steps</h1>
<div class="charts">
{% for chart in charts %}<div>{{ chart | safe }}</div>
{% endfor %}</div>
<h2>Rollouts</h2>
<p>A token's <span class="token" style="--shade:.7">shade</span> is the entropy of the distribution that produced it,
full at {{ shade }} nats; one row is one step, with its mean entropy at the end, in bold where it is highest. The
<span class="clip">EchoClip</span> is underlined.</p>
<div class="rollouts">
{% for rollout in rollouts %}<div class="rollout">
<div class="facts">step {{ rollout.step + 1 }}, group {{ rollout.group }}: reward {{ rollout.reward }},
advantage {{ "%.2f" | format(rollout.advantage) }}{% if not rollout.finished %}, truncated{% endif %}</div>
<div class="tokens"><b>{{ rollout.prompt }}</b></div>
{% for line in rollout.lines %}<div class="step{% if line.peak %} peak{% endif %}"><span class="tokens">
{%- for token in line.tokens -%}
<span class="token{% if token.clip %} clip{% endif %}" style="--shade:{{ token.shade }}" title="{{ token.entropy }}">
{{- token.text -}}</span>
{%- endfor %}</span><span class="mean">{{ line.mean }}</span></div>
{% endfor %}</div>
{% endfor %}</div>
<h2>Configuration</h2>
<pre>{{ config }}</pre>
</html>
"""
