"""Checks of functions that a user brings: `package.module:function` must name one that can be imported, and that
returns what its place needs for a small example."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from echorl_nemo.echo import select_clips
from echorl_nemo.echo.config import SPANS
from echorl_nemo.grpo import group_advantages
from echorl_nemo.grpo.config import ESTIMATORS, LOSSES
from echorl_nemo.grpo.loss import LossInputs, StepTotals, token_losses
from echorl_nemo.ops.registry import Registry, is_function_name
from echorl_nemo.schema import RunConfig


def function_problems(config: RunConfig) -> list[str]:
    """A problem for each function of the user's own, for advantages, loss or span, that cannot be imported or returns
    something else for two groups of rollouts with responses of eight tokens. Errors other than ValueError that such a
    function raises pass through, since their trace is what helps.

    Verifiers are checked with the data.
    """
    chosen: list[tuple[Registry, str, str, Callable[[RunConfig], None]]] = [
        (ESTIMATORS, config.algo.estimator, "rewards, group_ids, epsilon", _try_estimator),
        (LOSSES, config.algo.loss, "log_ratio, inputs, config, mask", _try_loss),
        (SPANS, config.echorl.span, "inputs", _try_span),
    ]
    problems = []
    for registry, name, arguments, try_it in chosen:
        try:
            function = registry.load(name)
            if is_function_name(name):
                _check_arguments(function, arguments)
                try_it(config)
        except ValueError as error:
            text = str(error)
            problems.append(text if text.startswith(registry.key) else f"{registry.key}={name}: {text}")
    return problems


def _check_arguments(function: Callable[..., Any], arguments: str) -> None:
    """Raises ValueError if ``function`` cannot be called with ``arguments``, names with commas."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin may have none
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise ValueError(f"it takes {signature}, and is called with ({arguments}): {error}") from error


RESPONSE = 8
"""Tokens of a response of the example; every second one ends a step."""


def _groups(config: RunConfig) -> torch.Tensor:
    return torch.arange(2).repeat_interleave(config.rollout.group_size)


def _try_estimator(config: RunConfig) -> None:
    group_ids = _groups(config)
    rewards = (torch.arange(len(group_ids)) % 2).float()
    group_advantages(rewards, group_ids, estimator=config.algo.estimator)


def _try_loss(config: RunConfig) -> None:
    rows = len(_groups(config))
    shape, algo = (rows, RESPONSE), config.algo
    advantages = torch.linspace(-1, 1, rows)
    by_token = algo.degenerate == "zvp" or algo.policy_tokens != "all"  # as the run will give them
    inputs = LossInputs(
        logprobs=torch.full(shape, -1.0),
        old_logprobs=torch.full(shape, -1.0),
        advantages=advantages[:, None].expand(shape) if by_token else advantages,
        response_mask=torch.ones(shape, dtype=torch.bool),
        counted=torch.ones(rows, dtype=torch.bool),
        entropies=torch.ones(shape),
        totals=StepTotals(rows, rows * RESPONSE, rows * RESPONSE),
        rollout_logprobs=torch.full(shape, -1.0),
        reference_logprobs=torch.full(shape, -1.0) if algo.kl_coef else None,
        mastered=torch.zeros(rows, dtype=torch.bool) if algo.anchor != "none" else None,
    )
    token_losses(torch.zeros(shape), inputs, config.algo, inputs.response_mask)


def _try_span(config: RunConfig) -> None:
    group_ids = _groups(config)
    steps = (torch.arange(RESPONSE) // 2).expand(len(group_ids), -1)
    select_clips(
        torch.linspace(0, 1, steps.numel()).view(steps.shape),
        steps,
        rewards=torch.full((len(group_ids),), config.echorl.success_reward),
        finished=torch.ones(len(group_ids), dtype=torch.bool),
        group_ids=group_ids,
        config=config.echorl,
        steps_before=steps,
    )
