"""Verifiers by name."""

import importlib
from collections.abc import Callable

from echorl_nemo.errors import UserError
from echorl_nemo.rewards.exact import exact_line

Verifier = Callable[[str, str], float]
"""(response, reference answer) -> reward."""

INSTANT: dict[str, Verifier] = {"exact_line": exact_line}
"""Cannot hang or crash, so that they need no process of their own."""


def find_verifier(name: str) -> Verifier:
    """The verifier ``name``: `exact_line`, `math` (math-verify), or a function of one's own, `package.module:name`.

    Raises UserError if there is none.
    """
    if name in INSTANT:
        return INSTANT[name]
    if name == "math":
        from echorl_nemo.rewards.math import math_equal  # sympy is slow to import

        return math_equal
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise UserError(f"reward {name!r} is not known; use exact_line, math, or your own as package.module:function")
    try:
        verifier = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward {name!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not callable(verifier):
        raise UserError(f"reward {name!r} is no function of (response, answer)")
    return verifier
