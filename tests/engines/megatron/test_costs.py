"""What a run does not pay for: padding to another rollout's length, gradients where nothing is trained."""

from collections.abc import Callable
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel

from echorl_nemo.engines.megatron import scorer as scoring
from echorl_nemo.engines.megatron.model import build_model
from echorl_nemo.engines.megatron.worker import initialize_parallel
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, PLATFORM, prepared_batch, tiny_config, trainer_of

Ranks = Callable[..., list[Any]]


def _widths(config: RunConfig) -> tuple[list[int], list[int], int]:
    """On a rank: columns of each micro-batch, what its longest rollout has, and what the longest of all has."""
    trainer = trainer_of(config)
    seen: list[tuple[int, int]] = []
    original = scoring._on_device

    def watched(batch: RolloutBatch, rows: list[int], width: int, device: Any) -> RolloutBatch:
        micro = original(batch, rows, width, device)
        seen.append((micro.tokens.shape[1], int(batch.lengths[rows].max())))
        return micro

    scoring._on_device = watched
    batch, _ = prepared_batch(trainer)
    trainer.policy.update(batch)
    return [width for width, _ in seen], [longest for _, longest in seen], int(batch.lengths.max())


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "DP2", "TP2+SP"])
def test_micro_batches_are_as_wide_as_their_own_longest_rollout(ranks: Ranks, layout: str) -> None:
    config = tiny_config(*LAYOUTS[layout], "trainer.micro_batch_size=2", "algo.entropy_coef=0.0")
    for widths, own, longest in ranks(1 if layout == "TP1" else 2, _widths, config):
        assert len(set(own)) > 1
        if layout == "PP2":  # stages exchange micro-batches of one shape
            assert set(widths) == {longest}
        else:
            padding = [width - length for width, length in zip(widths, own, strict=True)]
            assert max(padding) <= (1 if "SP" in layout else 0)


def _without_training(config: RunConfig) -> tuple[bool, bool]:
    config.parallel.data = 1
    model = build_model(config.model, config.parallel, initialize_parallel(config, PLATFORM), PLATFORM, train=False)
    weights = list(model.module.parameters())
    return isinstance(model.ddp, DistributedDataParallel), any(hasattr(weight, "main_grad") for weight in weights)


def test_nothing_is_made_for_gradients_where_nothing_is_trained(ranks: Ranks) -> None:
    assert ranks(1, _without_training, tiny_config()) == [(False, False)]


def _tokens(config: RunConfig) -> tuple[float, int, int]:
    """On a rank: tokens per second times seconds, tokens of all rollouts, and of those that were kept."""
    trainer = trainer_of(config)
    generate, made = trainer.rollout.generate, []

    def watched(*arguments: Any, **options: Any) -> RolloutBatch:
        batch = generate(*arguments, **options)
        made.append(int(batch.response_mask.sum()))
        return batch

    trainer.rollout.generate = watched  # type: ignore[method-assign]
    done = trainer.step()
    counted = done.metrics["tokens_per_second"] * done.metrics["time.step"]
    return counted, sum(made), int(done.batch.response_mask.sum())


def test_tokens_of_dropped_groups_are_counted_too(ranks: Ranks) -> None:
    config = tiny_config("algo=dapo", "algo.dynamic_sampling_rounds=2", "echorl.enabled=false", "data.eval=null")
    ((counted, made, kept),) = ranks(1, _tokens, config)
    assert counted == pytest.approx(made) and kept < made
