"""Checks of the overrides on a command line: their syntax, and the keys that they set."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from echorl_nemo.errors import did_you_mean


def parse_overrides(overrides: Sequence[str], names: dict[str, Path]) -> tuple[list[Override], list[str]]:
    """The overrides that Hydra can parse, and a problem for each one that it cannot."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except HydraException:
            problems.append(_explain_override(override, names))
        except ValueError as error:  # raised for a number with thousands of digits
            problems.append(f"{override[:80]}: {error}; give another value")
        else:
            if parsed[-1].value() == "???":
                parsed.pop()
                problems.append(f"{override}: ??? is not a value; give one")
            elif parsed[-1].is_sweep_override():
                problems.append(
                    f"{override}: several values for one key; start one run for each, or quote the value if it is one "
                    f"text: '{_quoted(override)}'"
                )
    return parsed, problems


def key_problems(
    parsed: Sequence[Override], directories: Sequence[Path], keys: Sequence[str], free: Sequence[str]
) -> list[str]:
    """Problems with unknown, added and deleted keys. Only entries of the dictionaries ``free`` may be added."""
    groups = {path.name for directory in directories for path in directory.iterdir() if path.is_dir()}
    problems = []
    for override in parsed:
        key = override.key_or_group
        if parent := next((name for name in free if key == name or key.startswith(f"{name}.")), None):
            if key == parent or not override.is_add():
                problems.append(
                    f"{override.input_line}: {parent} is a dictionary; add its entries: +{parent}.key=value"
                )
        elif key not in groups and key not in keys:
            problems.append(f"{override.input_line}: no such key; {did_you_mean(key, keys)}")
        elif key in groups and not (options := _options(directories, key)) >= {str(override.value())}:
            near = did_you_mean(str(override.value()), sorted(options))
            problems.append(f"{override.input_line}: no such choice; {near} There are {', '.join(sorted(options))}")
        elif override.is_add() and not override.is_force_add():
            problems.append(f"{override.input_line}: the key is there already; leave out the +, {key}=...")
        elif override.is_delete():
            problems.append(f"{override.input_line}: a key is not deleted; give its value, {key}=...")
    return problems


def _explain_override(override: str, names: dict[str, Path]) -> str:
    """The problem of an argument that is not an override."""
    key, equals, _ = override.partition("=")
    if not equals and key.removesuffix(".yaml") in names:
        return f"{override}: an argument is key=value; to choose a configuration use --config-name {key}"
    if not equals and re.fullmatch(r"[\w.+~@/]+\s+\S.*", key):
        first, rest = key.split(None, 1)
        return f"{override}: an argument is key=value; use {first}={rest}"
    if not equals:
        return f"{override}: an argument is key=value, as in echorl.coef=0.3"
    if not re.fullmatch(r"[~+]{0,2}[A-Za-z_]\w*([.@/][A-Za-z0-9_]+)*", key, re.ASCII):
        return f"{override}: {key!r} is not a key; write words joined by dots, as in echorl.coef=0.3"
    return f"{override}: the value has characters of Hydra's syntax; quote it twice: '{_quoted(override)}'"


def _quoted(override: str) -> str:
    key, _, value = override.partition("=")
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value.strip("\"'"))
    return f'{key}="{escaped}"'


def _options(directories: Sequence[Path], group: str) -> set[str]:
    return {path.stem for directory in directories for path in (directory / group).glob("*.yaml")}
