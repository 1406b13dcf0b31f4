"""The record that travels through a training step.

It lives in host memory, and every rank holds the whole batch, so that advantages and EchoClips are computed on the
same numbers everywhere. Generation, scoring and updates split it over data-parallel ranks by themselves.

Shapes: N rollouts, S positions (longest prompt and response of the batch).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True)
class RolloutBatch:
    """Rollouts of some prompts, filled in from one phase of a step to the next.

    Every [N, S] tensor is aligned to the token it speaks of: ``logprobs[:, t]`` belongs to the distribution that
    PRODUCED token t (the logits of position t-1). All are 0 or False outside the response.
    """

    tokens: Tensor
    """[N, S] int64: prompt, response, padding on the right."""
    response_mask: Tensor
    """[N, S] bool."""
    lengths: Tensor
    """[N] int64: tokens of prompt and response."""
    finished: Tensor
    """[N] bool: ended by a stop token; False if truncated."""
    group_ids: Tensor
    """[N] int64: the same for the rollouts of one prompt, unique in the run."""
    answers: list[str] = field(default_factory=list)
    """N reference answers, for the rewards."""
    prompts: list[str] = field(default_factory=list)
    """N prompts as text."""
    responses: list[str] = field(default_factory=list)
    """N responses as text, without special tokens unless `model.keep_special_tokens`."""
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    """N rows of the data, for verifiers that take one; empty where none does."""
    rollout_logprobs: Tensor | None = None
    """[N, S] float32 nats, under the distribution sampled from before top-p and top-k."""
    rewards: Tensor | None = None
    """[N] float32, before any shaping."""
    reward_parts: dict[str, Tensor] = field(default_factory=dict)
    """[N] float32 of each verifier, by its name."""
    advantages: Tensor | None = None
    """[N] float32."""
    counted: Tensor | None = None
    """[N] bool: the rollouts that take part in the policy loss."""
    old_logprobs: Tensor | None = None
    """[N, S] float32 nats."""
    reference_logprobs: Tensor | None = None
    """[N, S] float32 nats, of the reference policy."""
    entropies: Tensor | None = None
    """[N, S] float32 nats, exact, at the sampling temperature."""
    clip_mask: Tensor | None = None
    """[N, S] bool: the EchoClips."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def response_lengths(self) -> Tensor:
        """[N] int64 tokens."""
        return self.response_mask.sum(dim=1)

    def select(self, rows: Tensor | Sequence[int]) -> "RolloutBatch":
        """The rollouts ``rows`` (int64 indices), with the padding that they do not need cut off."""
        index = torch.as_tensor(rows, dtype=torch.long)
        width = int(self.lengths[index].max()) if len(index) else 0
        changed: dict[str, object] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, Tensor):
                changed[spec.name] = value[index][:, :width] if value.dim() == 2 else value[index]
            elif isinstance(value, list) and value:
                changed[spec.name] = [value[i] for i in index.tolist()]
            elif isinstance(value, dict):
                changed[spec.name] = {name: part[index] for name, part in value.items()}
        return replace(self, **changed)  # type: ignore[arg-type]


def concatenate(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of all rollouts, in order, padded to the longest. Fields must be filled in alike."""
    width = max(batch.tokens.shape[1] for batch in batches)
    joined: dict[str, object] = {}
    for spec in fields(RolloutBatch):
        values = [getattr(batch, spec.name) for batch in batches]
        if isinstance(values[0], Tensor):
            joined[spec.name] = torch.cat([pad_columns(v, width) if v.dim() == 2 else v for v in values])
        elif isinstance(values[0], list):
            joined[spec.name] = [item for value in values for item in value]
        elif isinstance(values[0], dict):
            joined[spec.name] = {name: torch.cat([value[name] for value in values]) for name in values[0]}
        else:
            joined[spec.name] = None
    return RolloutBatch(**joined)  # type: ignore[arg-type]


def pad_columns(values: Tensor, width: int) -> Tensor:
    """``values`` [N, S] with zeros (False) on the right up to ``width`` columns."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
