"""The batch of rollouts that the phases of a training step pass on.

It is in host memory. Each data-parallel rank holds the rollouts of the groups that it trains on; what must be known of
all rollouts of a step is gathered as columns, a value or a few for each rollout.

Shapes: N rollouts, S positions (longest prompt and response of the batch).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True)
class RolloutBatch:
    """Rollouts of some prompts. Each phase of a training step fills in further fields.

    Every [N, S] tensor is aligned to the produced token: ``old_logprobs[:, t]`` belongs to the distribution that
    produced token t (the logits of position t-1). All are 0 or False outside the response.
    """

    tokens: Tensor
    """[N, S] int64: prompt, response, padding on the right."""
    response_mask: Tensor
    """[N, S] bool."""
    lengths: Tensor
    """[N] int64: number of tokens of prompt and response together."""
    finished: Tensor
    """[N] bool: True if a stop token ended the response; False if it was truncated."""
    group_ids: Tensor
    """[N] int64: the same for the rollouts of one prompt, unique in the run."""
    answers: list[str] = field(default_factory=list)
    """N reference answers, for the rewards."""
    prompts: list[str] = field(default_factory=list)
    """N prompts as text."""
    responses: list[str] = field(default_factory=list)
    """N responses as text, without special tokens unless `model.keep_special_tokens`."""
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    """N rows of the data for verifiers that take one; empty if none does."""
    rollout_logprobs: Tensor | None = None
    """[N, S] float32 nats: log-probs of the rollout engine, at the sampling temperature, before top-p and top-k."""
    rewards: Tensor | None = None
    """[N] float32: the reward of the deciding verifier, before any shaping."""
    reward_parts: dict[str, Tensor] = field(default_factory=dict)
    """[N] float32: the reward of each verifier, by its name."""
    advantages: Tensor | None = None
    """[N] float32, or [N, S] where they differ by token."""
    expert: Tensor | None = None
    """[N] bool: the responses that are solutions of the data; None unless `algo.demonstrations=luffy`."""
    hint_mask: Tensor | None = None
    """[N, S] bool: the tokens of the prompt that begin its solution; None unless `algo.demonstrations=uft`."""
    mastered: Tensor | None = None
    """[N] bool: the rollouts of all-correct groups; None unless an anchor asks."""
    counted: Tensor | None = None
    """[N] bool: the rollouts that take part in the policy loss."""
    old_logprobs: Tensor | None = None
    """[N, S] float32 nats: log-probs of the policy before the step's update."""
    reference_logprobs: Tensor | None = None
    """[N, S] float32 nats: log-probs of the reference policy."""
    entropies: Tensor | None = None
    """[N, S] float32 nats, exact, at the sampling temperature."""
    clip_weight: Tensor | None = None
    """[N, S] float32 >= 0: the weight of each token in the clip loss."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> Tensor:
        """[N] bool: the rollouts that the policy sampled, all but an expert's."""
        return torch.ones_like(self.finished) if self.expert is None else ~self.expert

    @property
    def response_lengths(self) -> Tensor:
        """[N] int64: number of tokens of each response."""
        return self.response_mask.sum(dim=1)

    def select(self, rows: Tensor | Sequence[int]) -> "RolloutBatch":
        """A batch of the rollouts with the indices ``rows``, as wide as the longest of them."""
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
    """One batch with the rollouts of all ``batches``, in order, padded to the longest. The same fields must be filled
    in in all of them."""
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
    """``values`` [N, S] padded with 0 or False on the right to ``width`` columns."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def rows_of_groups(batch: RolloutBatch, groups: Sequence[int]) -> Tensor:
    """The rows of ``batch`` whose group is among ``groups``, ascending."""
    return torch.isin(batch.group_ids, torch.tensor(list(groups), dtype=batch.group_ids.dtype)).nonzero()[:, 0]


def in_order(parts: Sequence[RolloutBatch], groups: Sequence[int]) -> RolloutBatch:
    """The rollouts of ``parts`` as one batch in the order of their groups in ``groups``."""
    batch = concatenate(parts)
    place = {group: number for number, group in enumerate(groups)}
    order = torch.tensor([place[group] for group in batch.group_ids.tolist()], dtype=torch.long).argsort(stable=True)
    return batch.select(order)


def blank_rollouts(like: RolloutBatch, count: int) -> RolloutBatch:
    """``count`` rollouts of one token with empty masks and no weights, with the fields of ``like``: a forward and
    backward over them changes no gradient."""
    width = max(1, like.tokens.shape[1])
    changed: dict[str, object] = {}
    for spec in fields(like):
        value = getattr(like, spec.name)
        if isinstance(value, Tensor):
            shape = (count, width) if value.dim() == 2 else (count,)
            changed[spec.name] = torch.zeros(shape, dtype=value.dtype)
        elif isinstance(value, list):
            changed[spec.name] = [value[0]] * count if value else []
        elif isinstance(value, dict):
            changed[spec.name] = {name: torch.zeros(count, dtype=part.dtype) for name, part in value.items()}
    changed["lengths"] = torch.ones(count, dtype=torch.long)
    return replace(like, **changed)  # type: ignore[arg-type]
