"""Settings in the override grammar of Hydra, which NeMo-Aligner and NeMo-RL share."""

import re
from collections.abc import Mapping
from typing import Any


def override(key: str, value: Any, *, add: bool = False) -> str:
    """``key=value``; with ``add`` also where the host's configuration has no such key."""
    return f"{'++' if add else ''}{key}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        # in quotes everything is text, but for quotes, and backslashes before one
        return '"' + re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + (r"\"" if match[2] else ""), value) + '"'
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    return repr(value)


def _key(key: str) -> str:
    """Keys know no quotes: what has a meaning in the grammar is escaped."""
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", key)
