"""The precision of a GPU, on the CPU: bf16 weights, float32 master weights in the distributed optimizer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.schema import RunConfig
from tests.engines.megatron import helpers
from tests.engines.megatron.helpers import LAYOUTS, prepared_batch, tiny_config, trainer_of


def _steps(config: RunConfig, dtype: torch.dtype) -> tuple[list[dict[str, float]], set[torch.dtype]]:
    helpers.PLATFORM = replace(helpers.PLATFORM, dtype=dtype)
    trainer = trainer_of(config)
    generated = trainer.rollout.generate(trainer.train_data.sequence(0, 2, seed=0), 2, seed=0)
    assert generated.rollout_logprobs is not None and generated.rollout_logprobs.isfinite().all()
    batch, _ = prepared_batch(trainer)
    metrics = [trainer.policy.update(batch).metrics for _ in range(3)]
    return metrics, {weight.dtype for weight in trainer.policy.model.module.parameters()}


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_bf16_trains_like_float32_to_its_rounding(ranks: Callable[..., list[Any]], layout: str) -> None:
    config = tiny_config(*LAYOUTS[layout], "echorl.coef=1")
    (exact, _), *_ = ranks(world_size(config), _steps, config, torch.float32)
    (rounded, dtypes), *_ = ranks(world_size(config), _steps, config, torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    assert rounded[-1]["clip_loss"] < rounded[0]["clip_loss"]
    for ours, expected in zip(rounded, exact, strict=True):
        for name in ("clip_loss", "entropy", "grad_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=0.05)
