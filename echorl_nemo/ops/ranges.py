"""Allowed values of settings, declared with their dataclass fields: the interval of a number, the words of a choice.

Standard library only, so that a configuration can be read and checked before torch is imported.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from echorl_nemo.ops.registry import Registry, unknown_name

INTERVAL = "interval"
CHOICES = "words"
NOTE = "note"


@dataclass(frozen=True)
class Interval:
    """A range of numbers in the usual notation: `[0, 1]`, `(0, 100]`."""

    text: str

    def __contains__(self, value: object) -> bool:
        """Whether ``value`` is a number in the interval. False for NaN, infinities, and what is not a number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low, high = self.bounds
        above = value > low if self.text.startswith("(") else value >= low
        return above and (value < high if self.text.endswith(")") else value <= high)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound."""
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)


def number(default: Any, interval: str, note: str = "") -> Any:
    """A dataclass field for a number, a list of numbers, or null if its type allows that.

    ``default``: the value, or a function that creates a list. ``interval``: `[least, most]`, with a round bracket if
    the bound itself is not allowed. ``note``: the reason, or what to use instead; it ends the error message.
    """
    metadata = {INTERVAL: Interval(interval), NOTE: note}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def choice(default: str, words: Sequence[str] | Registry) -> Any:
    """A dataclass field for one of ``words``, or for a name of a registry."""
    return field(default=default, metadata={CHOICES: words})


def field_problems(config: Any, prefix: str) -> list[str]:
    """Problems with values of the dataclass ``config`` that are not allowed. ``prefix``: the key of the section."""
    return list(_problems(config, prefix))


def check_fields(
    config: Any, prefix: str, more: Sequence[str] = (), error: Callable[[str], Exception] = ValueError
) -> None:
    """Raises ``error`` with every problem of ``config``, one a line: those of `field_problems`, then ``more``."""
    if problems := [*field_problems(config, prefix), *more]:
        raise error("\n".join(problems))


def _problems(config: Any, prefix: str) -> Iterator[str]:
    for spec in fields(config):
        value, key = getattr(config, spec.name), f"{prefix}.{spec.name}"
        words, interval = spec.metadata.get(CHOICES), spec.metadata.get(INTERVAL)
        if words is not None and value not in words:
            yield unknown_name(key, value, words)
        if interval is None or value is None or value == "???":  # omegaconf checks null and values that are missing
            continue
        if wrong := [item for item in (value if isinstance(value, (list, tuple)) else [value]) if item not in interval]:
            note = f"; {spec.metadata[NOTE]}" if spec.metadata[NOTE] else ""
            yield (
                f"{key}={value}: {wrong[0]} must lie in {interval.text}{note}"
                if isinstance(value, (list, tuple))
                else f"{key}={value} must lie in {interval.text}{note}"
            )
