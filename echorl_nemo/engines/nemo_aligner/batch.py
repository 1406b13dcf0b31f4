"""Batches in NeMo-Aligner: the data set of prompts, and the dictionary of tensors that holds the rollouts of a step.

Shapes: B rollouts of all replicas, S positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import divide
from nemo_aligner.algorithms.reinforce import ReinforceRolloutBatch
from torch import Tensor

from echorl_nemo.data.source import raise_bad_rows, read_rows
from echorl_nemo.errors import UserError


class GRPORolloutBatch(ReinforceRolloutBatch):
    """Tensors by name with one row for each rollout. All replicas hold the same rows until `chunk`."""

    def chunk(self, rank: int, split_size: int, seed: int = 0) -> "GRPORolloutBatch":
        """The rows of replica ``rank`` of ``split_size``. Upstream's method returns all rows, so that every replica
        trains on the same mini-batches. ``seed`` is not used; upstream's signature has it."""
        part = type(self)()
        for name, values in self.data.items():
            share = divide(len(values), split_size)
            part[name] = values[rank * share : (rank + 1) * share].clone()
        return part

    def sorted_by_group(self) -> "GRPORolloutBatch":
        """A copy in which the rollouts of a prompt are in consecutive rows."""
        order = torch.argsort(self.data["group_ids"], stable=True)
        ordered = type(self)()
        for name, values in self.data.items():
            ordered[name] = values[order]
        return ordered


def response_mask(prompt_lengths: Tensor, response_lengths: Tensor, sequence_length: int) -> Tensor:
    """[B, S - 1] bool: column t is True if token t + 1 belongs to the response. ``response_lengths`` include the
    prompt."""
    tokens = torch.arange(1, sequence_length, device=prompt_lengths.device)
    return (tokens >= prompt_lengths[:, None]) & (tokens < response_lengths[:, None])


def pad_to_multiple(tokens: Tensor, multiple: int, *, eos_id: int) -> Tensor:
    """``tokens`` padded with EOS to a width that ``multiple`` divides, so that sequence parallelism can split it."""
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % multiple), value=eos_id)


class PromptDataset(torch.utils.data.Dataset):
    """Prompts with reference answers, from JSON lines or any source that `datasets` reads."""

    def __init__(self, source: str, tokenizer: Any, *, longest: int, field: str) -> None:
        """``longest``: most tokens that a prompt may have. ``field``: the configuration key of ``source``, for errors.

        Each row has `prompt` (or `text`, as upstream calls it) and, if verifiers decide the reward, `answer`. Raises
        UserError for bad rows.
        """
        self.rows: list[dict[str, Any]] = []
        problems = []
        for where, row in read_rows(source, subset=None, split="train", field=field):
            if isinstance(row, UserError):
                problems.append(str(row))
                continue
            text = row.get("prompt", row.get("text"))
            if not isinstance(text, str) or not text:
                problems.append(f"{where}: prompt={text!r} is not a text; the row has {', '.join(map(str, row))}")
                continue
            tokens = tokenizer.text_to_ids(text)
            if len(tokens) > longest:
                problems.append(
                    f"{where}: the prompt has {len(tokens)} tokens; use at most {longest}, which is "
                    "model.encoder_seq_length minus model.grpo.length_params.max_length"
                )
                continue
            self.rows.append({"tokens": tokens, "answer": str(row.get("answer", "")), "index": len(self.rows)})
        raise_bad_rows(problems)
        if not self.rows:
            raise UserError(f"{field}={source}: it holds no prompt; name another source")

    def drop_incomplete_step(self, size: int) -> int:
        """Remove the last rows so that ``size`` divides the number of rows; return how many were removed."""
        left_out = len(self.rows) % size
        del self.rows[len(self.rows) - left_out :]
        return left_out

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate_prompts(items: Sequence[dict[str, Any]], *, response_length: int, eos_id: int) -> dict[str, Any]:
    """Collate prompts into `text` [n, longest prompt + ``response_length``] padded with EOS, `length` [n], `answers`
    and `group_ids` [n]."""
    lengths = [len(item["tokens"]) for item in items]
    text = torch.full((len(items), max(lengths) + response_length), eos_id)
    for row, item in zip(text, items, strict=True):
        row[: len(item["tokens"])] = torch.tensor(item["tokens"])
    return {
        "text": text,
        "length": torch.tensor(lengths),
        "answers": [item["answer"] for item in items],
        "group_ids": torch.tensor([item["index"] for item in items]),
    }
