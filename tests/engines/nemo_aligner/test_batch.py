import json
from pathlib import Path

import pytest
import torch
from nemo_aligner.algorithms.reinforce import ReinforceRolloutBatch
from nemo_aligner.utils.ppo_utils import create_mask

from echorl_nemo.engines.nemo_aligner.batch import (
    GRPORolloutBatch,
    PromptDataset,
    collate_prompts,
    pad_to_multiple,
    response_mask,
)
from echorl_nemo.errors import UserError


class Letters:
    """A tokenizer whose tokens are characters."""

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_replicas_get_different_rollouts() -> None:
    values = {"tokens": torch.arange(8).view(4, 2), "rewards": torch.arange(4.0)}
    upstream = [ReinforceRolloutBatch(values).chunk(rank, 2, seed=0)["rewards"].tolist() for rank in range(2)]
    assert upstream == [[0, 1, 2, 3]] * 2  # the defect: when this fails, upstream has corrected it
    ours = [GRPORolloutBatch(values).chunk(rank, 2) for rank in range(2)]
    assert [part["rewards"].tolist() for part in ours] == [[0, 1], [2, 3]]
    assert [part["tokens"].tolist() for part in ours] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_rollouts_are_sorted_by_group() -> None:
    batch = GRPORolloutBatch({"group_ids": torch.tensor([3, 1, 3, 1]), "rewards": torch.arange(4.0)})
    assert batch.sorted_by_group()["rewards"].tolist() == [1, 3, 0, 2]


def test_the_response_mask_is_upstreams() -> None:
    prompt, response = torch.tensor([2, 5, 1]), torch.tensor([4, 5, 7])
    expected = create_mask(torch.zeros(3, 6), prompt, response)
    assert torch.equal(response_mask(prompt, response, 7), expected.bool())


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "ab", "answer": 7}) + "\n" + json.dumps({"text": "c"}) + "\n")
    data = PromptDataset(str(path), Letters(), longest=2, field="data.train")
    batch = collate_prompts([data[1], data[0]], response_length=3, eos_id=0)
    assert batch["text"].tolist() == [[99, 0, 0, 0, 0], [97, 98, 0, 0, 0]]
    assert batch["length"].tolist() == [1, 2]
    assert batch["answers"] == ["", "7"] and batch["group_ids"].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"prompts.jsonl:1: the prompt has 2 tokens; use at most 1"):
        PromptDataset(str(path), Letters(), longest=1, field="data.train")
    path.write_text('{"question": "?"}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:1: prompt=None is not a text; the row has question"):
        PromptDataset(str(path), Letters(), longest=1, field="data.train")


def test_rows_are_padded_to_what_sequence_parallelism_splits() -> None:
    tokens = torch.ones(2, 9, dtype=torch.long)
    padded = pad_to_multiple(tokens, 4, eos_id=7)
    assert padded.tolist() == [[1] * 9 + [7] * 3] * 2
    assert torch.equal(pad_to_multiple(padded, 4, eos_id=7), padded)
