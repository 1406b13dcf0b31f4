"""Jinja templates over the columns of a row."""

from typing import Any

import jinja2

from echorl_nemo.errors import UserError


def compile_template(text: str | None, field: str) -> jinja2.Template | None:
    """The template of the config key ``field``. Raises UserError for what is none."""
    if text is None:
        return None
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["last_boxed"] = last_boxed
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(f"{field}: no Jinja template: {error}") from error


def render(template: jinja2.Template, row: dict[str, Any], where: str, field: str) -> str:
    """The template's text for a row at ``where``. Raises UserError if the row lacks a column."""
    try:
        return template.render(**row, row=row)
    except (jinja2.UndefinedError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {field}: {error}; the row has {', '.join(row)}") from error


def last_boxed(text: str) -> str:
    r"""What stands in the last \boxed{} of ``text``, with the braces in it. Raises ValueError if there is none,
    TypeError for what is no text."""
    if not isinstance(text, str):
        raise TypeError(f"last_boxed of {text!r}, which is no text")
    start = text.rfind(r"\boxed{")
    if start < 0:
        raise ValueError(r"no \boxed{} in the text")
    start += len(r"\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    raise ValueError(r"a \boxed{ that does not close")
