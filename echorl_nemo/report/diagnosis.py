"""Warnings about a run, derived from its metrics."""

from collections.abc import Sequence
from typing import Any

import yaml

WINDOW = 10
"""Number of latest steps whose mean is compared with that of as many first steps."""
LENGTH_GROWTH = 1.25
LOW_STOP_COVERAGE = 0.2


def stop_bias_warning(history: Sequence[dict[str, Any]]) -> str:
    """A warning if responses grow while few EchoClips hold the response's last token; empty if not.

    A clip that ends before the response's end holds tokens that continue the response, and none that stop it, so that
    its NLL may teach the policy to go on (docs/method.md). A predictable selection has no such bias. The warning comes
    at most once in `WINDOW` steps. ``history``: the metrics of all steps so far.
    """
    if len(history) < 2 * WINDOW or len(history) % WINDOW or "echorl.stop_coverage" not in history[-1]:
        return ""
    if history[-1].get("echorl.predictable"):
        return ""
    first, last = history[:WINDOW], history[-WINDOW:]
    before, after = _mean(first, "response_length"), _mean(last, "response_length")
    coverage = _mean(last, "echorl.stop_coverage")
    if after < LENGTH_GROWTH * before or coverage >= LOW_STOP_COVERAGE:
        return ""
    return (
        f"responses grew from {before:.0f} to {after:.0f} tokens while {coverage:.0%} of the EchoClips hold the "
        "response's last token, and the selection is not predictable: the clips may teach the policy to go on; use "
        "echorl=fork_tokens or echorl=survival; compare echorl.span=full with echorl.per_group=all and "
        "echorl.normalizer=constant; or lower echorl.coef (docs/method.md)"
    )


NEARLY_ALL = 0.9


def step_warnings(history: Sequence[dict[str, Any]]) -> list[str]:
    """Warnings about the latest step of ``history``, the metrics of all steps so far. Each warning comes when its cause
    appears, and every `WINDOW` steps while the cause lasts."""
    now = _conditions(history[-1])
    before = _conditions(history[-2]) if len(history) > 1 else {}
    due = len(history) % WINDOW == 0
    return [text for name, text in now.items() if due or name not in before]


def run_warnings(history: Sequence[dict[str, Any]]) -> list[str]:
    """Warnings about a whole run: those that hold for most of its latest `WINDOW` steps."""
    last = [_conditions(row) for row in history[-WINDOW:]]
    names = [name for name in last[-1] if sum(name in each for each in last) > len(last) / 2] if last else []
    return [last[-1][name] for name in names]


def _conditions(row: dict[str, Any]) -> dict[str, str]:
    """Warnings about the metrics of one step, by the name of their cause."""
    found = {}
    if row.get("truncated", 0.0) >= NEARLY_ALL:
        found["truncated"] = (
            f"{row['truncated']:.0%} of the rollouts were truncated: no stop token was sampled; raise "
            "rollout.max_new_tokens, or name the token that ends a turn in model.stop_tokens"
        )
    if row.get("echorl.clips") == 0.0 and row.get("echorl.eligible", 0.0) > 0:
        found["clips"] = (
            f"no EchoClip was found: {row['echorl.eligible']:.0f} rollouts are verified successes, and echorl.span "
            "gave no token of those chosen a weight"
        )
    elif row.get("echorl.clips") == 0.0:
        found["clips"] = (
            "no EchoClip was found: no finished rollout reached echorl.success_reward; look at truncated and reward"
        )
    if row.get("echorl.unsegmented", 0.0) >= NEARLY_ALL:
        found["unsegmented"] = (
            f"{row['echorl.unsegmented']:.0%} of the responses have no boundary, so that the clip is the whole "
            "response; choose echorl.boundary for this tokenizer and task"
        )
    return found


def changed_settings(before: str | bytes, after: str) -> list[str]:
    """A sentence for each key in which two configurations differ, with both values. ``before`` and ``after`` are YAML
    texts, as the run folder keeps them."""
    try:
        theirs = _flat(dict(yaml.safe_load(before)))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError):
        return ["the configuration of the last attempt cannot be read, so that changes are not known"]
    ours = _flat(yaml.safe_load(after))
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
