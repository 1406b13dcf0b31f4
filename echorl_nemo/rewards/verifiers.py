"""Verifiers by name."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from echorl_nemo.errors import UserError
from echorl_nemo.rewards.choice import choice, letter_of
from echorl_nemo.rewards.exact import exact_line

Verifier = Callable[..., float]
"""(response, reference answer) -> reward, or (response, reference answer, row) -> reward."""

INSTANT: dict[str, Callable[[str, str], float]] = {"exact_line": exact_line, "choice": choice}
"""Their time is linear in the text and they cannot crash, so that they need no process of their own."""


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the module of a user may raise anything, sys.exit() too
        cause = str(error) if isinstance(error, (ImportError, AttributeError)) else repr(error)
        raise UserError(f"reward {name!r} cannot be imported: {cause}; is its folder on PYTHONPATH?") from error
    if not callable(verifier):
        raise UserError(f"reward {name!r} is no function of (response, answer)")
    if _positional(verifier) not in (2, 3):
        raise UserError(f"reward {name!r} is no function of (response, answer) or (response, answer, row)")
    return verifier


def takes_row(verifier: Verifier) -> bool:
    """Whether a verifier wants the data's row, the prompt and every other column, as its third argument."""
    return _positional(verifier) == 3


def reference_problem(name: str, answer: str) -> str:
    """Why no response could ever match a reference answer; empty if one could."""
    if name == "choice" and not letter_of(answer):
        return f"{answer!r} is no letter from A to J, and the verifier choice compares letters"
    if name == "exact_line" and len(answer.strip().splitlines()) > 1:
        return f"{answer!r} has several lines, and the verifier exact_line reads one"
    return ""


def _positional(function: Callable[..., Any]) -> int:
    """Arguments that a function must be, or may be, given by position, at most 3; 2 where that cannot be known."""
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function of C
        return 2
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 2
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in places and p.default is inspect.Parameter.empty]
    if len(required) in (0, 1, 2) and sum(kind in places for kind in kinds) >= 2:
        return 2
    return len(required)
