"""What EchoRL adds to GRPO, and when it adds nothing."""

from collections.abc import Callable
from typing import Any

import torch

from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import prepared_batch, tiny_config, trainer_of

GRPO, ECHORL = ["echorl=off", "algo.entropy_coef=0"], ["algo.entropy_coef=0"]


def _update(config: RunConfig, rewards: list[list[float]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    trainer = trainer_of(config)
    batch, _ = prepared_batch(trainer, rewards=rewards)
    metrics = trainer.policy.update(batch).metrics
    weights = {name: weight.detach().clone() for name, weight in trainer.policy.model.module.named_parameters()}
    return metrics, weights


def update(ranks: Callable[..., list[Any]], rewards: list[list[float]], *overrides: str) -> Any:
    return ranks(1, _update, tiny_config(*overrides), rewards)[0]


def test_all_correct_teaches_echorl_alone(ranks: Callable[..., list[Any]]) -> None:
    rewards = [[1.0] * 4] * 4
    assert update(ranks, rewards, *GRPO)[0]["grad_norm"] == 0.0
    metrics, _ = update(ranks, rewards, *ECHORL)
    assert metrics["grad_norm"] > 0.0 and metrics["clip_loss"] > 0.0


def test_all_wrong_teaches_neither(ranks: Callable[..., list[Any]]) -> None:
    rewards = [[0.0] * 4] * 4
    assert update(ranks, rewards, *GRPO)[0]["grad_norm"] == 0.0
    assert update(ranks, rewards, *ECHORL)[0]["grad_norm"] == 0.0


def test_nothing_eligible_is_bit_equal_to_grpo(ranks: Callable[..., list[Any]]) -> None:
    rewards = [[0.5, 0.0, 0.2, 0.1], [0.0, 0.3, 0.0, 0.0], [0.1, 0.1, 0.4, 0.1], [0.9, 0.0, 0.0, 0.0]]
    metrics, weights = update(ranks, rewards, *GRPO)
    with_echorl, weights_with_echorl = update(ranks, rewards, *ECHORL)
    assert metrics == with_echorl and metrics["grad_norm"] > 0
    assert all(torch.equal(weights[name], weights_with_echorl[name]) for name in weights)
