"""Scores and rollouts against independent forwards of the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, example_batch, tiny_config, trainer_of, whole


def _score(config: RunConfig) -> tuple[RolloutBatch, torch.Tensor, torch.Tensor]:
    trainer = trainer_of(config)
    batch = example_batch(trainer.boundary_ids[0], eos=1)
    return batch, *trainer.policy.score(batch)


TOKENS = 36
"""Of the embedded task's tokenizer; the model's embedding has 40 rows."""


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_a_float64_forward_of_transformers(ranks: Callable[..., list[Any]], temperature: float) -> None:
    config = tiny_config(*LAYOUTS["TP2"], f"rollout.temperature={temperature}")
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64).eval()
    for batch, logprobs, entropies in ranks(2, _score, config):
        with torch.no_grad():
            logs = (model(batch.tokens).logits[:, :-1, :TOKENS] / temperature).log_softmax(dim=-1)
        expected = logs.gather(-1, batch.tokens[:, 1:, None])[..., 0]
        mask = batch.response_mask[:, 1:]
        torch.testing.assert_close(logprobs[:, 1:][mask].double(), expected[mask], rtol=1e-4, atol=1e-4)
        expected = -(logs.exp() * logs).sum(dim=-1)
        torch.testing.assert_close(entropies[:, 1:][mask].double(), expected[mask], rtol=1e-4, atol=1e-4)
        assert logprobs[~batch.response_mask].eq(0).all() and entropies[~batch.response_mask].eq(0).all()


def _generate(config: RunConfig, seed: int) -> tuple[RolloutBatch, torch.Tensor, torch.Tensor]:
    trainer = trainer_of(config)
    batch = trainer.rollout.generate(trainer.train_data.sequence(0, 4, seed=0), config.rollout.group_size, seed=seed)
    batch.old_logprobs, batch.reference_logprobs = trainer.policy.score(batch)  # the second are its entropies
    batch = whole(trainer, batch)
    assert batch.old_logprobs is not None and batch.reference_logprobs is not None
    return batch, batch.old_logprobs, batch.reference_logprobs


def rollouts(ranks: Callable[..., list[Any]], *overrides: str, seed: int = 0) -> list[Any]:
    config = tiny_config(*overrides)
    return ranks(world_size(config), _generate, config, seed)


def texts(batch: RolloutBatch) -> list[str]:
    return [batch.prompts[i] + "|" + batch.responses[i] for i in range(len(batch))]


SAMPLING = ["rollout.max_new_tokens=24", "rollout.temperature=1.5"]
"""Some responses are truncated, and most differ."""


@pytest.fixture(scope="module")
def sampled(ranks: Callable[..., list[Any]], request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        (result,) = rollouts(ranks, *SAMPLING)
    return result


def test_rollouts_are_well_formed(sampled: Any) -> None:
    batch: RolloutBatch = sampled[0]
    assert len({len(prompt) for prompt in batch.prompts}) > 1  # prompts of different lengths in one batch
    assert batch.group_ids.tolist() == [group for group in range(4) for _ in range(4)]
    assert batch.finished.any() and (~batch.finished).any()
    lengths = batch.response_lengths
    assert lengths[~batch.finished].eq(24).all() and lengths.max() <= 24
    last = batch.tokens[torch.arange(16), batch.lengths - 1]
    assert last.eq(1).tolist() == batch.finished.tolist()
    assert len(set(texts(batch))) > 8


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2xPP2", "DP2", "TP2+SP", "CP2", "TP2xCP2+SP", "PP2xCP2"])
def test_a_seed_gives_the_same_rollouts_in_every_layout(
    ranks: Callable[..., list[Any]], sampled: Any, layout: str
) -> None:
    for batch, logprobs, entropies in rollouts(ranks, *SAMPLING, *LAYOUTS[layout]):
        assert texts(batch) == texts(sampled[0])
        assert torch.equal(batch.tokens, sampled[0].tokens)
        for ours, scored in ((batch.rollout_logprobs, logprobs), (batch.entropies, entropies)):
            torch.testing.assert_close(ours, scored, rtol=1e-4, atol=1e-4)


def test_rollouts_do_not_depend_on_the_generation_batch(ranks: Callable[..., list[Any]], sampled: Any) -> None:
    ((batch, *_),) = rollouts(ranks, *SAMPLING, "rollout.batch_size=3")
    assert texts(batch) == texts(sampled[0])


def test_another_seed_gives_other_rollouts(ranks: Callable[..., list[Any]], sampled: Any) -> None:
    ((batch, *_),) = rollouts(ranks, *SAMPLING, seed=1)
    assert texts(batch) != texts(sampled[0])


def test_kv_cached_log_probs_equal_the_scored_ones_under_top_p_and_top_k(ranks: Callable[..., list[Any]]) -> None:
    ((batch, logprobs, entropies),) = rollouts(ranks, "rollout.top_p=0.8", "rollout.top_k=5")
    torch.testing.assert_close(batch.rollout_logprobs, logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.entropies, entropies, rtol=1e-4, atol=1e-4)
