"""`echorl=paper` in the native engine: the paper's formulas, in every layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from echorl_nemo.echo import segment_steps
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, example_batch, off_policy, prepared_batch, tiny_config, trainer_of
from tests.paper import paper, rows_of

PAPER = ["echorl=paper", "echorl.coef=0.3", "trainer.minibatch_prompts=2"]


def _losses(config: RunConfig) -> list[tuple[float, float]]:
    """The clip loss of 20 batches as the engine reports it, and as the paper's formulas give it."""
    trainer = trainer_of(config)
    (newline,) = trainer.boundary_ids
    found = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rewards = (torch.rand(4, 4, generator=generator) < 0.6).float().tolist()
        batch = example_batch(newline, eos=1, rewards=rewards, seed=seed)
        trainer.score(batch)
        trainer.estimate_advantages(batch)
        trainer.select_clips(batch, segment_steps(batch.tokens, batch.response_mask, trainer.boundary_ids))
        expected = []
        for first in range(2):  # two mini-batches of two groups
            part = batch.select(torch.isin(batch.group_ids, torch.tensor([first, first + 2])).nonzero()[:, 0])
            weights, loss = paper(rows_of(part, part.entropies, part.old_logprobs), {newline})
            assert part.clip_weight is not None
            torch.testing.assert_close(part.clip_weight.double(), torch.tensor(weights, dtype=torch.float64))
            expected.append(loss)
        found.append((trainer.policy.update(batch).metrics["clip_loss"], sum(expected) / 2))
    return found


def test_the_clip_loss_is_the_papers(ranks: Callable[..., list[Any]]) -> None:
    (losses,) = ranks(1, _losses, tiny_config(*PAPER, "trainer.lr=0", "trainer.micro_batch_size=3"))
    assert len({round(loss, 3) for _, loss in losses}) > 15
    for ours, expected in losses:
        assert ours == pytest.approx(expected, rel=1e-6)


def _steps(config: RunConfig) -> list[dict[str, float]]:
    trainer = trainer_of(config)
    batch = off_policy(prepared_batch(trainer)[0])
    return [trainer.policy.update(batch).metrics for _ in range(2)]


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("TP1", ["trainer.micro_batch_size=1"]),
        ("TP1", ["trainer.micro_batch_size=2"]),
        ("TP2", ["trainer.micro_batch_size=4"]),
        ("PP2", ["trainer.micro_batch_size=2"]),
        ("DP2", ["trainer.micro_batch_size=2"]),
        ("DP2", ["trainer.pack_tokens=80", "rollout.max_new_tokens=50"]),
        ("TP2", ["trainer.pack_tokens=1000"]),
        ("CP2", ["trainer.micro_batch_size=2"]),
        ("CP2", ["trainer.pack_tokens=80", "rollout.max_new_tokens=50"]),
    ],
)
def test_steps_are_the_same(ranks: Callable[..., list[Any]], layout: str, options: list[str]) -> None:
    (expected,) = ranks(1, _steps, tiny_config(*PAPER))
    config = tiny_config(*PAPER, *LAYOUTS[layout], *options)
    for result in ranks(world_size(config), _steps, config):
        for ours, theirs in zip(result, expected, strict=True):
            assert ours["clip_loss"] > 0 and ours == pytest.approx(theirs, rel=1e-4)
