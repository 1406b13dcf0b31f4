"""Allowed values of settings, declared with their dataclass fields: the interval of a number, the words of a choice.

Standard library only, so that a configuration can be read and checked before torch is imported.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, get_args

from echorl_nemo.ops.registry import Registry, unknown_name

NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
INTERVAL = "interval"
CHOICES = "words"
NOTE = "note"
KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
"""What a value of each type is called in messages."""
MISSING = "???"
"""OmegaConf's mark of a value that must be given, which OmegaConf reports itself."""


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
        if wrong_type := _type_problem(value, spec.type):
            yield f"{key}={value!r} {wrong_type}"
            continue
        if words is not None and value not in words:
            yield unknown_name(key, value, words)
        if interval is None or value is None or value == MISSING:
            continue
        if wrong := [item for item in (value if isinstance(value, (list, tuple)) else [value]) if item not in interval]:
            note = f"; {spec.metadata[NOTE]}" if spec.metadata[NOTE] else ""
            yield (
                f"{key}={value}: {wrong[0]} must lie in {interval.text}{note}"
                if isinstance(value, (list, tuple))
                else f"{key}={value} must lie in {interval.text}{note}"
            )


def _type_problem(value: Any, annotation: Any) -> str:
    """What is wrong with the type of ``value`` in a field of one of `KINDS`, or of one and None; empty if nothing is.

    OmegaConf checks and converts before this where a configuration passes through it; a host's own section does not.
    """
    allowed = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = [kind for kind in allowed if kind in KINDS]
    if len(kinds) != 1 or value == MISSING:
        return ""
    kind = kinds[0]
    if value is None:
        return "" if type(None) in allowed else f"is not {KINDS[kind]}; give a value"
    wanted = (int, float) if kind is float else kind
    if isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)):
        return ""
    if isinstance(value, str) and kind in (int, float) and NUMBER.fullmatch(value):
        return f"is a text and not {KINDS[kind]}; write it without quotes, and a power of ten with a point: 1.0e-3"
    return f"is not {KINDS[kind]}"
