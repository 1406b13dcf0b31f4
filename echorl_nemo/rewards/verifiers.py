"""Verifiers by name."""

import importlib
from collections.abc import Callable

from echorl_nemo.errors import UserError
from echorl_nemo.rewards.choice import choice
from echorl_nemo.rewards.exact import exact_line

Verifier = Callable[[str, str], float]
"""(response, reference answer) -> reward."""

INSTANT: dict[str, Verifier] = {"exact_line": exact_line, "choice": choice}
"""Cannot hang or crash, so that they need no process of their own."""


def find_verifier(name: str) -> Verifier:
    """The verifier ``name``: `exact_line`, `choice`, `math` (math-verify), or one's own, `package.module:function`.

    Raises UserError if there is none.
    """
    if name in INSTANT:
        return INSTANT[name]
    if name == "math":
        from echorl_nemo.rewards.math import math_equal  # sympy is slow to import

        return math_equal
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise UserError(
            f"reward {name!r} is not known; use exact_line, choice, math, or your own as package.module:function"
        )
    try:
        verifier = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward {name!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not callable(verifier):
        raise UserError(f"reward {name!r} is no function of (response, answer)")
    return verifier
