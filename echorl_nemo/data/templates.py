"""Jinja templates over the columns of a row."""

import math
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from echorl_nemo.errors import UserError
from echorl_nemo.rewards.boxed import last_box


def compile_template(text: str | None, field: str) -> jinja2.Template | None:
    """Compile the template that the configuration key ``field`` holds. Raises UserError if it is not a template."""
    if text is None:
        return None
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_text_or_number
    )
    environment.filters["last_boxed"] = last_boxed
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(f"{field}: not a Jinja template: {error}") from error


def render(template: jinja2.Template, row: dict[str, Any], where: str, field: str) -> str:
    """Render the template with the columns of the row at ``where``. Raises UserError if the row lacks a column, or a
    rendered value is not a text or a number."""
    try:
        return template.render({"row": row, **row})
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"{where}: {field}: {error}; the row has {', '.join(map(str, row))}") from error


def last_boxed(text: str) -> str:
    r"""The content of the last \boxed{} in ``text``, its inner braces included. Raises ValueError if there is none,
    TypeError if ``text`` is not a text."""
    if not isinstance(text, str):
        raise TypeError(f"last_boxed of {text!r}, which is not a text")
    box = last_box(text)
    if box is None:
        raise ValueError(r"no \boxed{} that closes in the text")
    return box[1]


def _text_or_number(value: Any) -> Any:
    """``value``, if a template may print it. Raises TypeError for others: null would be printed as None, and a list or
    a method in Python's notation."""
    if not isinstance(value, (str, int, float, jinja2.Undefined)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise TypeError(f"{value!r} is not a text or a number")
    return value
