"""Finds verifiers by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from echorl_nemo.errors import UserError
from echorl_nemo.ops.registry import Registry
from echorl_nemo.rewards.choice import letter_of

Verifier = Callable[..., float]
"""(response, reference answer) -> reward, or (response, reference answer, row) -> reward."""

VERIFIERS = Registry(
    "verifier",
    {
        "math": "echorl_nemo.rewards.math:math_equal",
        "exact_line": "echorl_nemo.rewards.exact:exact_line",
        "choice": "echorl_nemo.rewards.choice:choice",
    },
    accepts_functions=True,
)
IN_PROCESS = ("exact_line", "choice")
"""Verifiers that run in the rank's process: their time is linear in the text, and they cannot crash."""


def find_verifier(name: str) -> Verifier:
    """The verifier ``name``: `exact_line`, `choice`, `math` (math-verify), or a user's `package.module:function`.

    Raises UserError if there is no such verifier.
    """
    try:
        verifier: Verifier = VERIFIERS.load(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's module may raise anything, also by sys.exit()
        if isinstance(error, ValueError) and str(error).startswith(VERIFIERS.key):
            raise UserError(str(error)) from error
        raise UserError(f"verifier={name}: it cannot be imported: {error!r}; check its name and PYTHONPATH") from error
    if _positional(verifier) not in (2, 3):
        raise UserError(
            f"verifier={name}: it is not a function of (response, answer) or (response, answer, row); change its "
            "arguments"
        )
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
