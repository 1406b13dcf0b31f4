"""Exact entropies from the logits of NeMo-RL's log-prob pass, also for packed rows and context parallelism.

Shapes: B rollouts of a micro-batch, S positions, T tokens of a packed row, v vocabulary columns of this rank.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_context_parallel_group, get_tensor_model_parallel_group
from nemo_rl.distributed.model_utils import allgather_cp_sharded_tensor
from nemo_rl.models.megatron.train import LogprobsPostProcessor
from torch import Tensor

from echorl_nemo.ops import logprob_and_entropy


class EchoLogprobsPostProcessor(LogprobsPostProcessor):
    """Upstream's `LogprobsPostProcessor`, which also collects the entropies of each micro-batch, [B, S] on the host."""

    def __init__(self, *args: Any, collected: list[Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._collected = collected

    def __call__(
        self, data_dict: Any, input_ids: Tensor, cu_seqlens_padded: Tensor | None, **kwargs: Any
    ) -> Callable[[Tensor], Any]:
        inner = super().__call__(
            data_dict=data_dict, input_ids=input_ids, cu_seqlens_padded=cu_seqlens_padded, **kwargs
        )
        packed = self.cfg["sequence_packing"]["enabled"]

        def process(logits: Tensor) -> Any:
            # before upstream's call, which may overwrite the logits
            entropies = token_entropies(
                logits, tuple(data_dict["input_ids"].shape), cu_seqlens_padded if packed else None
            )
            self._collected.append(entropies.cpu())
            return inner(logits)

        return process


def token_entropies(logits: Tensor, shape: tuple[int, int], cu_seqlens_padded: Tensor | None) -> Tensor:
    """The entropy of each token's distribution, [B, S] float32 nats, aligned to the produced token; 0 at the first.

    ``logits`` [B, S, v], or [1, T / CP, v] of a packed row whose sequences begin at ``cu_seqlens_padded`` [B + 1];
    already divided by the temperature, as NeMo-RL does before it takes log-probs.
    """
    nowhere = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    _, values = logprob_and_entropy(logits, nowhere, group=get_tensor_model_parallel_group())
    made = torch.zeros(shape, device=logits.device)
    if cu_seqlens_padded is None:
        made[:, 1:] = values[:, : shape[1] - 1]
        return made
    group = get_context_parallel_group()
    ranks = dist.get_world_size(group)
    starts = cu_seqlens_padded.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        own = values[:, start // ranks : end // ranks]
        whole = allgather_cp_sharded_tensor(own, group, seq_dim=1) if ranks > 1 else own
        length = min(shape[1], end - start)
        made[row, 1:length] = whole[0, : length - 1]
    return made
