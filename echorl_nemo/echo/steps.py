"""Steps: the lines of a response.

Shapes: N rollouts, S positions.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class VocabularyText(Protocol):
    """The two methods of a tokenizer that `boundary_ids` calls; every Hugging Face tokenizer has them."""

    def __len__(self) -> int: ...

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]: ...


def boundary_ids(tokenizer: VocabularyText, rule: str | Sequence[int] = "newline") -> tuple[int, ...]:
    """Token ids that end a step.

    ``rule`` is ``"newline"``: every id whose text contains a newline, so that ``".\\n\\n"`` counts; or the ids
    themselves (``[198, 271]`` in the paper's script for Qwen).

    Raises ValueError if the vocabulary has no such id.
    """
    size = len(tokenizer)
    if not isinstance(rule, str):
        ids = tuple(sorted(set(rule)))
        outside = [i for i in ids if not 0 <= i < size]
        if outside or not ids:
            raise ValueError(
                f"echorl.boundary={list(rule)}: ids {outside} are outside the vocabulary of {size} entries; use "
                "smaller ids"
            )
        return ids
    if rule != "newline":
        raise ValueError(f"echorl.boundary={rule!r} is not known; use 'newline' or a list of token ids")
    texts = tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False)
    ids = tuple(i for i, text in enumerate(texts) if "\n" in text)
    if not ids:
        raise ValueError(
            f"echorl.boundary=newline: none of the {size} vocabulary entries contains a newline; "
            "set echorl.boundary to the list of token ids that end a step"
        )
    return ids


def segment_steps(tokens: Tensor, response_mask: Tensor, boundary_ids: Sequence[int]) -> Tensor:
    """The number of the step that each response token belongs to, [N, S] int64, from 0; -1 outside the response.

    A step is a run of response tokens that ends with its boundary tokens. A run of consecutive boundary tokens ends
    one step; what follows the last boundary, EOS included, is the last step.

    ``tokens`` [N, S] int64, ``response_mask`` [N, S] bool.
    """
    boundaries = torch.tensor(sorted(boundary_ids), dtype=tokens.dtype, device=tokens.device)
    is_boundary = torch.isin(tokens, boundaries) & response_mask
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    latest = torch.where(response_mask, positions, -1).cummax(dim=1).values
    previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)  # last response position before each one
    after_boundary = (previous >= 0) & is_boundary.gather(1, previous.clamp(min=0))
    starts = response_mask & after_boundary & ~is_boundary
    return torch.where(response_mask, starts.long().cumsum(dim=1), -1)


def count_steps_before(tokens: Tensor, response_mask: Tensor, boundary_ids: Sequence[int]) -> Tensor:
    """The number of steps that end before each response token, [N, S] int64; 0 outside the response.

    It is known before the token is: the step that a boundary ends has ended, whether or not another boundary follows.
    So it differs from `segment_steps` at the further tokens of a run of boundaries. Arguments as in `segment_steps`.
    """
    step_ids = segment_steps(tokens, response_mask, boundary_ids)
    is_boundary = torch.isin(tokens, torch.tensor(sorted(boundary_ids), dtype=tokens.dtype, device=tokens.device))
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    latest = torch.where(response_mask, positions, -1).cummax(dim=1).values
    previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    ended = step_ids + is_boundary.long()  # at each token, the steps that end with it or before it
    return torch.where(response_mask & (previous >= 0), ended.gather(1, previous.clamp(min=0)), 0)
