from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from echorl_nemo.engines.nemo_aligner.config import VerifierConfig
from echorl_nemo.engines.nemo_aligner.rewards import InProcessRewards
from tests.engines.nemo_aligner.helpers import LAYOUTS, tiny_config, trainer_of


def _rewards(config: DictConfig) -> tuple[torch.Tensor, int]:
    tokenizer = trainer_of(config).model.tokenizer
    texts = ["a6+7=3\nA:3\n", "A:5\n"]  # right; wrong, and of 4 characters
    ids = [[*tokenizer.text_to_ids(text), tokenizer.eos_id] for text in texts]
    width = max(map(len, ids)) + 2
    tokens = torch.tensor([[0, 0, *row] + [tokenizer.eos_id] * (width - 2 - len(row)) for row in ids])
    verifier = VerifierConfig(name="exact_line", extra={"tests.rewards.verifiers:answers_length": 0.5})
    rewards = InProcessRewards(verifier, tokenizer)
    pending = rewards.infer_rm(
        {
            "response_tokens": tokens,
            "prompt_lengths": torch.tensor([2, 2]),
            "response_lengths": torch.tensor([2 + len(row) for row in ids]),
            "answers": ["3", "4"],
        }
    )
    table = pending.result()
    rewards.close()
    return table, rewards.failures


def test_every_rank_of_a_replica_gets_the_rewards(
    ranks: Callable[..., list[Any]], tiny_nemo: Path, tmp_path: Path
) -> None:
    world, overrides = LAYOUTS["TP2xPP2"]
    for table, failures in ranks(world, _rewards, tiny_config(tiny_nemo, tmp_path, *overrides)):
        assert table[:, 0].tolist() == [1.0, 0.0]
        assert table[:, 1].tolist() == [0.0, 1.0] and failures == 0
