"""Checks of functions that a user brings: `package.module:function` must name one that can be imported."""

from echorl_nemo.echo.config import SPANS
from echorl_nemo.grpo.config import ESTIMATORS, LOSSES
from echorl_nemo.ops.registry import Registry
from echorl_nemo.schema import RunConfig


def function_problems(config: RunConfig) -> list[str]:
    """A problem for each function of the user's own, for advantages, loss or span, that cannot be imported.

    Verifiers are checked with the data.
    """
    chosen: list[tuple[Registry, str]] = [
        (ESTIMATORS, config.algo.estimator),
        (LOSSES, config.algo.loss),
        (SPANS, config.echorl.span),
    ]
    problems = []
    for registry, name in chosen:
        try:
            registry.load(name)
        except ValueError as error:
            problems.append(str(error))
    return problems
