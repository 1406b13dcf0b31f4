"""The default selection in NeMo-Aligner's actor: the paper's formulas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from echorl_nemo.engines.nemo_aligner.batch import GRPORolloutBatch
from tests.engines.nemo_aligner.helpers import example_batch, tiny_config, trainer_of
from tests.paper import Row, paper


def _losses(config: DictConfig) -> list[tuple[float, float]]:
    """The clip loss of 20 batches as the actor reports it, and as the paper's formulas give it."""
    trainer = trainer_of(config)
    model, (newline,) = trainer.model, trainer.boundary_ids
    found = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        example = example_batch(newline, model.tokenizer.eos_id, vocabulary=model.tokenizer.vocab_size, seed=seed)
        tokens, mask = example["response_tokens"], example["mask"]
        positions = torch.arange(1, tokens.shape[1])
        rewards = (torch.rand(16, generator=generator) < 0.6).float()
        batch = GRPORolloutBatch(
            {
                "response_tokens": tokens,
                "prompt_lengths": torch.where(mask, positions, 1000).amin(dim=1),
                "response_lengths": torch.where(mask, positions, 0).amax(dim=1) + 1,
                "rewards": rewards,
                "is_end": torch.arange(16) % 7 != 6,
                "group_ids": torch.arange(16) // 4,
            }
        )
        model.prepare_for_inference()
        share, _ = trainer.generate_reinforce_data(batch)
        _, entropies = model.score(tokens)
        trainer.timer.consume_durations()
        model.finish_inference()
        model.prepare_for_training()
        model.prepare_for_training_step()
        _, metrics = model.get_loss_and_metrics(dict(share), forward_only=True)
        model.finish_training_step()
        model.finish_training()
        rows = [
            Row(
                tokens[i, 1:].tolist(), mask[i].tolist(), entropies[i].tolist(),
                share["old_logprobs"][i].tolist(), bool(rewards[i] == 1.0 and batch["is_end"][i]), i // 4,
            )
            for i in range(16)
        ]  # fmt: skip
        weights, loss = paper(rows, {newline})
        torch.testing.assert_close(share["clip_weight"].double(), torch.tensor(weights, dtype=torch.float64))
        found.append((metrics["clip_loss"], loss))
    return found


def test_the_clip_loss_is_the_papers(ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path) -> None:
    settings = ["model.echorl.per_group=top", "model.echorl.normalizer=clip_mean"]
    (losses,) = ranks(1, _losses, tiny_config(tiny_nemo, tmp_path, *settings))
    assert len({round(loss, 3) for _, loss in losses}) > 15
    for ours, expected in losses:
        assert ours == pytest.approx(expected, rel=1e-5)
