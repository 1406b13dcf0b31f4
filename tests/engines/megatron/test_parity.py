"""The same weights, data and seed give the same step in every layout and micro-batch size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, off_policy, prepared_batch, tiny_config, trainer_of, whole


def _first_steps(config: RunConfig) -> dict[str, Any]:
    """Scores and statistics of the example, and the metrics of three optimizer steps on it."""
    trainer = trainer_of(config)
    batch, stats = prepared_batch(trainer)
    all_ranks = whole(trainer, batch)
    scored = (all_ranks.old_logprobs, all_ranks.entropies)
    batch = off_policy(batch)
    metrics = [trainer.policy.update(batch).metrics for _ in range(3)]
    return {"scored": scored, "clip_weight": all_ranks.clip_weight, "stats": stats, "metrics": metrics}


def run(ranks: Callable[..., list[Any]], *overrides: str) -> list[dict[str, Any]]:
    config = tiny_config("algo=dapo", "algo.entropy_coef=0.01", *overrides)
    return ranks(world_size(config), _first_steps, config)


@pytest.fixture(scope="module")
def baseline(ranks: Callable[..., list[Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        (result,) = run(ranks)
    return result


def test_the_example_has_what_makes_it_hard(baseline: dict[str, Any]) -> None:
    clips = baseline["clip_weight"].any(dim=1)
    assert clips[:8].sum() == 6 and clips[8:].sum() == 1
    for metrics in baseline["metrics"]:
        assert 0.02 < metrics["ratio_clipped"] < 0.98
        assert all(metrics[name] != 0 for name in ("loss", "policy_loss", "clip_loss", "entropy", "grad_norm"))


@pytest.mark.parametrize(
    ("layout", "micro_batch_size"),
    [
        ("TP1", 1),
        ("TP1", 2),
        ("TP2", 2),
        ("PP2", 1),
        ("PP2", 4),
        ("PP2", 3),
        ("TP2xPP2", 4),
        ("DP2", 1),
        ("DP2", 4),
        ("DP2", 5),
        ("TP2+SP", 3),
        ("TP2xPP2+SP", 4),
        ("CP2", 1),
        ("CP2", 3),
        ("TP2xCP2", 2),
        ("TP2xCP2+SP", 4),
        ("PP2xCP2", 3),
        ("CP2xDP2", 2),
    ],
)
def test_steps_are_the_same(
    ranks: Callable[..., list[Any]], baseline: dict[str, Any], layout: str, micro_batch_size: int
) -> None:
    for result in run(ranks, *LAYOUTS[layout], f"trainer.micro_batch_size={micro_batch_size}"):
        for ours, expected in zip(result["scored"], baseline["scored"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(result["clip_weight"], baseline["clip_weight"])
        assert result["stats"] == pytest.approx(baseline["stats"], rel=1e-4)
        for ours, expected in zip(result["metrics"], baseline["metrics"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "pack_tokens"), [*((layout, 80) for layout in LAYOUTS), ("TP1", 1000), ("DP2", 1000), ("CP2", 1000)]
)
def test_packed_rows_give_the_same_steps(
    ranks: Callable[..., list[Any]], baseline: dict[str, Any], layout: str, pack_tokens: int
) -> None:
    """Rows of 80 tokens hold three or four of the sixteen rollouts, rows of 1000 all that a replica has."""
    packing = ["rollout.max_new_tokens=50", f"trainer.pack_tokens={pack_tokens}"]
    for result in run(ranks, *LAYOUTS[layout], *packing):
        for ours, expected in zip(result["scored"], baseline["scored"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(result["clip_weight"], baseline["clip_weight"])
        for ours, expected in zip(result["metrics"], baseline["metrics"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_changes_nothing(
    ranks: Callable[..., list[Any]], baseline: dict[str, Any], recompute: str
) -> None:
    for result in run(ranks, *LAYOUTS["TP2+SP"], f"trainer.recompute={recompute}"):
        for ours, expected in zip(result["metrics"], baseline["metrics"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo"])
def test_other_aggregations_are_the_same_over_data_parallel_ranks(ranks: Callable[..., list[Any]], preset: str) -> None:
    overrides = [f"algo={preset}", "echorl=paper"]
    (whole,) = run(ranks, *overrides)
    for part in run(ranks, *overrides, *LAYOUTS["DP2"], "trainer.micro_batch_size=2"):
        for ours, expected in zip(part["metrics"], whole["metrics"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-4)
