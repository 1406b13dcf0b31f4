"""Finds verifiers by name."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from echorl_nemo.errors import UserError
from echorl_nemo.rewards.choice import choice, letter_of
from echorl_nemo.rewards.exact import exact_line

Verifier = Callable[..., float]
"""(response, reference answer) -> reward, or (response, reference answer, row) -> reward."""

IN_PROCESS: dict[str, Callable[[str, str], float]] = {"exact_line": exact_line, "choice": choice}
"""Verifiers that run in the rank's process: their time is linear in the text, and they cannot crash."""


def find_verifier(name: str) -> Verifier:
    """The verifier ``name``: `exact_line`, `choice`, `math` (math-verify), or a user's `package.module:function`.

    Raises UserError if there is no such verifier.
    """
    if name in IN_PROCESS:
        return IN_PROCESS[name]
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
    except BaseException as error:  # a user's module may raise anything, also by sys.exit()
        cause = str(error) if isinstance(error, (ImportError, AttributeError)) else repr(error)
        raise UserError(f"reward {name!r} cannot be imported: {cause}; is its folder on PYTHONPATH?") from error
    if not callable(verifier):
        raise UserError(f"reward {name!r} is not a function of (response, answer)")
    if _positional(verifier) not in (2, 3):
        raise UserError(f"reward {name!r} is not a function of (response, answer) or (response, answer, row)")
    return verifier


def takes_row(verifier: Verifier) -> bool:
    """Whether a verifier takes the row of the data, with the prompt and all other columns, as a third argument."""
    return _positional(verifier) == 3


def reference_problem(name: str, answer: str) -> str:
    """The reason why no response can match a reference answer; empty if one can."""
    if name == "choice" and not letter_of(answer):
        return f"{answer!r} is not a letter from A to J, and the verifier choice compares letters"
    if name == "exact_line" and len(answer.strip().splitlines()) > 1:
        return f"{answer!r} has several lines, and the verifier exact_line reads one"
    return ""


def _positional(function: Callable[..., Any]) -> int:
    """Number of positional arguments to call a function with: 2 or 3. 2 if its signature cannot be known."""
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function written in C
        return 2
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 2
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in places and p.default is inspect.Parameter.empty]
    if len(required) in (0, 1, 2) and sum(kind in places for kind in kinds) >= 2:
        return 2
    return len(required)
