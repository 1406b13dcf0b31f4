"""Prints docs/configuration.md from the dataclasses of the configuration: `python -m echorl_nemo.config_reference`."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_args

from echorl_nemo.ops.ranges import CHOICES, INTERVAL
from echorl_nemo.schema import EvaluateConfig, RunConfig

HEADER = """# Every key of the configuration

Made from the dataclasses by `python -m echorl_nemo.config_reference`; a test keeps it so. Set a key on the command
line (`trainer.lr=1e-6`) or in a file of your own (`--config-dir`). A value outside its range is refused before a run
starts.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    seen: set[type] = set()
    parts = [HEADER]
    for schema in (RunConfig, EvaluateConfig):
        for prefix, section in _sections(schema, ""):
            if section not in seen:
                seen.add(section)
                parts.append(_table(prefix, section))
    return "\n".join(parts)


def allowed(spec: Field) -> str:
    """The allowed values of a field as text: an interval or a list of words; empty if any value of its type is
    allowed."""
    if CHOICES in spec.metadata:
        words = spec.metadata[CHOICES]
        return ", ".join([*words, *(["package.module:function"] if getattr(words, "accepts_functions", False) else [])])
    return spec.metadata[INTERVAL].text if INTERVAL in spec.metadata else ""


def _sections(schema: Any, prefix: str) -> Iterator[tuple[str, type]]:
    """Every dataclass of the configuration with the key that it stands under."""
    yield prefix, schema
    for spec in fields(schema):
        key = f"{prefix}.{spec.name}".lstrip(".")
        if is_dataclass(spec.type):
            yield from _sections(spec.type, key)
        for inner in get_args(spec.type):
            if is_dataclass(inner):
                yield from _sections(inner, f"{key}[]")


def _table(prefix: str, section: type) -> str:
    rows = [
        f"| `{f'{prefix}.{spec.name}'.lstrip('.')}` | {_type(spec)} | {_default(spec)} | {allowed(spec)} | {text} |"
        for spec, text in zip(fields(section), _docstrings(section), strict=True)
        if not is_dataclass(spec.type)
    ]
    if not rows:
        return ""
    title = f"`{prefix}`" if prefix else "Top level"
    about = (section.__doc__ or "").strip()
    return f"## {title}\n{about}\n\n| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n" + "".join(
        f"{row}\n" for row in rows
    )


def _docstrings(section: type) -> Iterator[str]:
    """The text under each field, on one line."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            yield text.replace("|", "\\|")


def _type(spec: Field) -> str:
    name = spec.type.__name__ if isinstance(spec.type, type) and not get_args(spec.type) else str(spec.type)
    return re.sub(r"[\w.]+\.(\w+)", r"\1", name).replace("|", "or")


def _default(spec: Field) -> str:
    value = spec.default_factory() if spec.default_factory is not MISSING else spec.default
    if value == "???":
        return "required"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(page(), end="")
