"""The expected gradient of the clip loss on a policy whose responses are enumerated exactly.

Every response finishes and is a success, so that the reward says nothing: a gradient that is not 0 is drift.
"""

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from echorl_nemo.echo import EchoRLConfig, clip_denominator, clip_loss, count_steps_before, segment_steps, select_clips
from echorl_nemo.echo.predictable import unpredictable_settings

WORD, NEWLINE, STOP = 0, 1, 2
LONGEST = 5
ROLLOUTS = 2
CONSTANT: dict[str, Any] = {"per_group": "all", "normalizer": "constant", "constant_length": 7}


def logits(prefix: tuple[int, ...], go_on: Tensor) -> Tensor:
    """Of word, newline and stop: they differ with what came before, are the surer the later, so that peaks lie early,
    and ``go_on`` lowers every stop. A response of `LONGEST` tokens stops."""
    if len(prefix) == LONGEST - 1:
        return torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(prefix) * 100 + sum((t + 1) * 7**i for i, t in enumerate(prefix)))
    random = len(prefix) * torch.randn(3, generator=generator, dtype=torch.float64)
    return random - torch.stack([go_on * 0, go_on * 0, go_on])


@cache
def responses() -> tuple[list[tuple[int, ...]], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """All responses; log-probs and entropies of their tokens, the derivative of each log-prob by ``go_on``, and the
    probability of each response."""
    found, logprobs, entropies, slopes = [], [], [], []
    for length in range(1, LONGEST + 1):
        for body in itertools.product((WORD, NEWLINE), repeat=length - 1):
            response = (*body, STOP)
            go_on = torch.zeros((), dtype=torch.float64, requires_grad=True)
            tables = [logits(response[:t], go_on).log_softmax(0) for t in range(length)]
            own = torch.stack([table[token] for table, token in zip(tables, response, strict=True)])
            slopes.append(torch.stack([_slope(value, go_on) for value in own]))
            found.append(response)
            logprobs.append(own.detach())
            entropies.append(torch.stack([_entropy(table.detach()) for table in tables]))
    return found, logprobs, entropies, slopes, torch.stack([own.sum() for own in logprobs]).exp()


def _slope(value: Tensor, parameter: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros((), dtype=torch.float64)
    return torch.autograd.grad(value, parameter, retain_graph=True)[0]


def _entropy(table: Tensor) -> Tensor:
    return -torch.where(table.isfinite(), table.exp() * table, 0.0).sum()


def expected_gradient(config: EchoRLConfig, *, by_own_step: bool = False, groups: int = ROLLOUTS) -> float:
    """E of the derivative of the clip loss by ``go_on``, over every batch of `ROLLOUTS` independent responses.
    ``by_own_step``: give `survival` the tokens' own steps, which look at the tokens."""
    found, logprobs, entropies, slopes, probability = responses()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    total = 0.0
    for rows in itertools.product(range(len(found)), repeat=ROLLOUTS):
        tokens = _padded([torch.tensor(found[row]) for row in rows], STOP)
        mask = _padded([torch.ones(len(found[row]), dtype=torch.bool) for row in rows], False)
        steps = segment_steps(tokens, mask, [NEWLINE])
        before = steps.clamp(min=0) if by_own_step else count_steps_before(tokens, mask, [NEWLINE])
        weight = select_clips(
            _padded([entropies[row] for row in rows], 0.0).float(), steps, rewards=torch.ones(ROLLOUTS),
            finished=torch.ones(ROLLOUTS, dtype=torch.bool), group_ids=torch.arange(ROLLOUTS) % groups, config=config,
            steps_before=before, threshold=0.6,
        ).weight  # fmt: skip
        z = clip_denominator(weight, mask, config.normalizer, constant=float(ROLLOUTS * config.constant_length))
        own = _padded([logprobs[row] for row in rows], 0.0).requires_grad_()
        loss = clip_loss(own, weight.double(), z, token_weight=config.token_weight)
        (by_token,) = torch.autograd.grad(loss, own)
        slope = float((by_token * _padded([slopes[row] for row in rows], 0.0)).sum())
        total += float(probability[list(rows)].prod()) * slope
    return total


def _padded(rows: list[Tensor], fill: float) -> Tensor:
    return torch.stack([torch.nn.functional.pad(row, (0, LONGEST - len(row)), value=fill) for row in rows])


@pytest.mark.parametrize("span", ["full", "fork_tokens", "survival"])
def test_predictable_selections_have_no_drift(span: str) -> None:
    config = EchoRLConfig(span=span, fork_threshold="running", **CONSTANT)
    assert abs(expected_gradient(config)) < 1e-12
    assert not unpredictable_settings(config)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"span": "prefix"}, "echorl.span=prefix"),
        ({"span": "peak_step"}, "echorl.span=peak_step"),
        ({"span": "clip_and_stop"}, "echorl.span=clip_and_stop"),
        ({"span": "full", "normalizer": "clip_mean"}, "echorl.normalizer=clip_mean"),
        ({"span": "full", "token_weight": "probability"}, "echorl.token_weight=probability"),
    ],
)
def test_others_have(changed: dict[str, object], named: str) -> None:
    config = EchoRLConfig(**{**CONSTANT, **changed})
    assert abs(expected_gradient(config)) > 1e-4
    assert unpredictable_settings(config) == [named]


def test_a_rollout_that_is_chosen_by_its_course_has() -> None:
    """`per_group` other than `all` looks at the whole responses of a group."""
    for per_group in ("top", "lowest"):
        config = EchoRLConfig(span="full", per_group=per_group, normalizer="constant")
        assert abs(expected_gradient(config, groups=1)) > 1e-6
        assert unpredictable_settings(config) == [f"echorl.per_group={per_group}"]


def test_the_tokens_own_step_has() -> None:
    """A newline that follows a newline belongs to the old step, another token to the next: the number of the token's
    own step depends on the token."""
    config = EchoRLConfig(span="survival", **CONSTANT)
    assert abs(expected_gradient(config, by_own_step=True)) > 1e-4


def test_what_is_shared_by_the_step_is_not_named() -> None:
    config = EchoRLConfig(span="fork_tokens", per_group="all", normalizer="clip_tokens")
    assert not unpredictable_settings(config)
    assert unpredictable_settings(EchoRLConfig(span="mine.py:span", per_group="all", normalizer="constant"))
