"""The stand-ins of CI take what the checkout's own functions take, under the same names and in the same order."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.engines.nemo_rl import stand_ins
from tests.engines.nemo_rl.real import NEEDED, PRESENT

pytestmark = pytest.mark.skipif(not PRESENT, reason=NEEDED)

OF_TESTS = {"setup", "grpo_train"}
"""Stand-ins that our code replaces or wraps by name and never calls; they have what their tests need."""
METHODS = ("__init__", "__call__", "get_logprobs", "get_reference_policy_logprobs", "compute_advantage")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

CASES = [
    (module, name)
    for module, names in stand_ins.MODULES.items()
    for name, value in names.items()
    if callable(value) and name not in OF_TESTS and module != "ray"
]


def functions_of(ours: Any, theirs: Any) -> list[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    if not inspect.isclass(ours):
        return [(ours.__name__, ours, theirs)]
    return [(name, vars(ours)[name], getattr(theirs, name)) for name in METHODS if name in vars(ours)]


def problems(name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> list[str]:
    real = inspect.signature(theirs).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in real.values())
    mine = [parameter for parameter in inspect.signature(ours).parameters.values() if parameter.kind not in VARIADIC]
    unknown = [p.name for p in mine if p.name not in real and not takes_all]
    order = [p.name for p in mine if p.name in real]
    found = [f"{name} has no parameter {unknown}"] if unknown else []
    if order != [parameter for parameter in real if parameter in order]:
        found.append(f"{name} takes {order} in another order: {list(real)}")
    return found


@pytest.mark.parametrize(("module", "name"), CASES, ids=[f"{module}.{name}" for module, name in CASES])
def test_a_stand_in_takes_what_the_checkout_takes(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(module), name)
    pairs = functions_of(stand_ins.MODULES[module][name], theirs)
    assert [line for pair in pairs for line in problems(*pair)] == []
