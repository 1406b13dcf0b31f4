"""Solutions of the data in the training steps of the native engine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.grpo import AlgoConfig
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, tiny_config, trainer_of

Ranks = Callable[..., list[Any]]
BUDGET = ["rollout.max_new_tokens=60", "trainer.minibatch_prompts=2"]
DEMONSTRATIONS = {
    "luffy": ["algo=luffy", "algo.denominator=all", *BUDGET],
    "uft": ["algo=uft", "algo.hint_coef=0.5", "algo.hint_high=0.5", *BUDGET],
}


def _steps(config: RunConfig) -> list[tuple[dict[str, float], RolloutBatch]]:
    trainer = trainer_of(config)
    return [(step.metrics, step.batch) for step in (trainer.step(), trainer.step())]


def test_an_expert_joins_each_group(ranks: Ranks) -> None:
    (steps,) = ranks(1, _steps, tiny_config(*DEMONSTRATIONS["luffy"]))
    for metrics, batch in steps:
        assert batch.expert is not None and batch.expert.view(4, 5).tolist() == [[False] * 4 + [True]] * 4
        assert batch.rewards is not None and batch.advantages is not None and batch.clip_weight is not None
        rewards = batch.rewards.view(4, 5)
        assert (rewards[:, -1] == 1).all() and batch.finished[batch.expert].all()  # the verifier has read them
        assert batch.responses[4].endswith("\n") and not batch.clip_weight[batch.expert].any()
        # in the mean of its group, and not in all_one
        torch.testing.assert_close(batch.advantages.view(4, 5), rewards - rewards.mean(dim=1, keepdim=True))
        assert metrics["all_one"] == float((rewards[:, :4] == 1).all(dim=1).float().mean())
        assert metrics["reward"] == pytest.approx(float(rewards[:, :4].mean()))
        assert metrics["rollout.logprob_gap"] < 1e-4  # over what the engine sampled
        assert metrics["grad_norm"] > 0


def test_a_group_without_success_learns_from_its_expert(ranks: Ranks) -> None:
    failing = tiny_config(*DEMONSTRATIONS["luffy"], "rollout.temperature=20", "echorl=off")  # no rollout is right
    (steps,) = ranks(1, _steps, failing)
    metrics, batch = steps[0]
    assert metrics["all_zero"] == 1.0 and metrics["grad_norm"] > 0
    assert batch.expert is not None and batch.advantages is not None
    assert (batch.advantages[batch.expert] > 0).all()


def _hints(config: RunConfig) -> list[tuple[RolloutBatch, float, float]]:
    """Batches with the NLL of their hints as the update reports it, and as a scoring pass over the hints gives it."""
    trainer = trainer_of(config)
    found = []
    for _ in range(2):
        batch, _ = trainer.roll_out()
        trainer.score(batch)
        trainer.estimate_advantages(batch)
        trainer.steps_done += 1
        assert batch.hint_mask is not None
        expected = []
        for first in range(2):
            part = batch.select(torch.isin(batch.group_ids, batch.group_ids.unique()[first::2]).nonzero()[:, 0])
            assert part.hint_mask is not None
            part.response_mask = part.hint_mask
            logprobs, _ = trainer.policy.score(part)
            count = int(part.hint_mask.sum())
            expected.append(-float(logprobs.double().sum()) / count if count else 0.0)
        found.append((batch, trainer.policy.update(batch).metrics["hint_loss"], sum(expected) / 2))
    return found


def test_a_hint_ends_the_prompt_and_is_imitated(ranks: Ranks) -> None:
    config = tiny_config(*DEMONSTRATIONS["uft"], "trainer.lr=0")
    (found,) = ranks(1, _hints, config)
    assert any(batch.hint_mask.any() for batch, _, _ in found)
    for batch, ours, expected in found:
        assert ours == pytest.approx(expected, rel=1e-5)
        assert not (batch.hint_mask & batch.response_mask).any()
        lengths = batch.hint_mask.sum(dim=1)
        assert (lengths.view(4, 4) == lengths.view(4, 4)[:, :1]).all()  # a group shares its prompt
        starts = batch.response_mask.int().argmax(dim=1)
        assert all(
            batch.hint_mask[row, int(start) - int(length) : int(start)].all()
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
        )
        hinted = int(lengths.argmax())
        assert batch.responses[hinted].startswith("a")  # the solution's first line, which the verifier reads too


def test_hints_of_a_large_seed(ranks: Ranks) -> None:
    config = tiny_config(*DEMONSTRATIONS["uft"], f"trainer.seed={2**53}")
    (found,) = ranks(1, _hints, config)
    assert any(batch.hint_mask.any() for batch, _, _ in found)


@pytest.mark.parametrize("kind", DEMONSTRATIONS)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("TP2", ["trainer.micro_batch_size=1"]),
        ("PP2", ["trainer.micro_batch_size=3"]),
        ("DP2", ["trainer.micro_batch_size=2"]),
        ("DP2", ["trainer.pack_tokens=400"]),
        ("CP2", ["trainer.micro_batch_size=2"]),
    ],
)
def test_steps_are_the_same(ranks: Ranks, kind: str, layout: str, options: list[str]) -> None:
    (expected,) = ranks(1, _steps, tiny_config(*DEMONSTRATIONS[kind]))
    config = tiny_config(*DEMONSTRATIONS[kind], *LAYOUTS[layout], *options)
    for result in ranks(world_size(config), _steps, config):
        for (ours, _), (theirs, _) in zip(result, expected, strict=True):
            for name in ("loss", "policy_loss", "hint_loss", "clip_loss", "grad_norm", "reward", "all_one"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
            assert (ours["hint_loss"] > 0) == (kind == "uft")


def test_what_contradicts_is_refused() -> None:
    with pytest.raises(ValueError, match="the rollout engine has no log-probs of a solution; use importance=policy"):
        AlgoConfig(demonstrations="luffy", importance="rollout")
