"""Warnings that a run gives a person, from its metrics."""

from collections.abc import Sequence
from typing import Any

import yaml

WINDOW = 10
"""Steps whose mean is compared with that of the run's first steps."""
LENGTH_GROWTH = 1.25
LOW_STOP_COVERAGE = 0.2


def stop_bias_warning(history: Sequence[dict[str, Any]]) -> str:
    """A warning if responses grow while few EchoClips hold the response's last token; empty if not.

    The clip is chosen by what was sampled: where the peak lies before the end, it holds tokens that go on and not
    those that stop, and the NLL on it may teach the policy to go on (docs/method.md). Said once every `WINDOW` steps.
    ``history``: the metrics of all steps so far.
    """
    if len(history) < 2 * WINDOW or len(history) % WINDOW or "echorl.stop_coverage" not in history[-1]:
        return ""
    first, last = history[:WINDOW], history[-WINDOW:]
    before, after = _mean(first, "response_length"), _mean(last, "response_length")
    coverage = _mean(last, "echorl.stop_coverage")
    if after < LENGTH_GROWTH * before or coverage >= LOW_STOP_COVERAGE:
        return ""
    return (
        f"responses grew from {before:.0f} to {after:.0f} tokens while {coverage:.0%} of the EchoClips hold the "
        "response's last token: the clips may teach the policy to go on; compare echorl.span=full or a smaller "
        "echorl.coef (docs/method.md)"
    )


def changed_settings(before: str, after: str) -> list[str]:
    """The keys in which two configurations differ, with both values; each a YAML text as a run folder keeps it."""
    ours, theirs = (_flat(yaml.safe_load(text)) for text in (after, before))
    return [
        f"{key}={theirs.get(key)} became {ours.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values)
