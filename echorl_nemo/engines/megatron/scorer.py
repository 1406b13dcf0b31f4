"""The scoring pass: log-probs and exact entropies of rollouts under a model.

Shapes: N rollouts, S positions, B rollouts of a micro-batch, v vocabulary columns of this tensor-parallel rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from echorl_nemo.engines.megatron.model import PolicyModel
from echorl_nemo.ops import logprob_and_entropy
from echorl_nemo.rollout.batch import RolloutBatch, pad_columns


class MegatronScorer:
    """A Megatron-Core model that scores rollouts. Every rank calls every method with the same whole batch."""

    def __init__(self, model: PolicyModel, *, temperature: float, micro_batch_size: int) -> None:
        self.model, self.parallel = model, model.parallel
        self.temperature, self.micro_batch_size = temperature, micro_batch_size
        self._forward_backward: Callable[..., list[Any]] = get_forward_backward_func()

    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens and exact entropies, each [N, S] float32 nats, from the same logits."""
        own = list(self.parallel.my_share(len(batch)))
        self.model.ddp.eval()
        with torch.no_grad():
            rows = own + [0] * self._filling(len(own))
            scored = self._run(batch, self._micro_batches(rows), self._score_logits, forward_only=True)
        width = batch.tokens.shape[1]
        flat = torch.cat([torch.stack(pair) for pair in scored], dim=1) if scored else None
        table = self.parallel.broadcast_from_last_stage(flat, (2, len(rows), width), torch.float32)
        table = table[:, : len(own)].cpu()
        result = torch.zeros(2, len(batch), width)
        for rows, values in self.parallel.share_over_replicas((own, table)):
            result[:, rows] = values
        result *= batch.response_mask
        return result[0], result[1]

    def _filling(self, rows: int) -> int:
        """Rows that fill a replica's last micro-batch: pipeline stages exchange micro-batches of one shape, and a
        replica without any rollout still takes part in every collective."""
        return -rows % self.micro_batch_size if rows else self.micro_batch_size

    def _micro_batches(self, rows: list[int]) -> list[list[int]]:
        size = self.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _run(
        self,
        batch: RolloutBatch,
        micro_rows: list[list[int]],
        use_logits: Callable[[Tensor, RolloutBatch], Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's pipeline schedule over the micro-batches; what ``use_logits`` gave for each, on the last stage."""

        def forward_step(rows: Iterator[list[int]], module: Any) -> tuple[Tensor, Callable[..., Any]]:
            micro = _on_device(batch, next(rows), self.parallel.device)
            positions = torch.arange(micro.tokens.shape[1], device=micro.tokens.device).expand_as(micro.tokens)
            output = module(micro.tokens, positions, None, **self.model.call_options)
            return output, lambda logits, non_loss_data=False: use_logits(logits, micro)

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(micro_rows),
            model=[self.model.ddp],
            num_microbatches=len(micro_rows),
            seq_length=batch.tokens.shape[1],
            micro_batch_size=len(micro_rows[0]),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _score_logits(self, logits: Tensor, micro: RolloutBatch) -> tuple[Tensor, Tensor]:
        return self._token_statistics(logits, micro, train=False)

    def _token_statistics(
        self, logits: Tensor, micro: RolloutBatch, *, train: bool, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each [B, S] and aligned to the token they speak of; ``logits`` [B, S, v]."""
        logprobs, entropies = logprob_and_entropy(
            logits,
            micro.tokens.roll(-1, dims=1),  # position t's logits produced token t + 1; the last one's are not used
            group=self.parallel.tensor_group,
            temperature=self.temperature,
            entropy_grad=entropy_grad,
            inplace_backward=train,
        )
        # one column to the right; where() rather than a product, since 0 * -inf is NaN
        aligned = [torch.nn.functional.pad(values[:, :-1], (1, 0)) for values in (logprobs, entropies)]
        return (
            torch.where(micro.response_mask, aligned[0], 0.0),
            torch.where(micro.response_mask, aligned[1], 0.0),
        )


def _on_device(batch: RolloutBatch, rows: list[int], device: torch.device) -> RolloutBatch:
    """The rollouts ``rows`` on the device, at the whole batch's width: a pipeline's micro-batches have one shape."""
    micro = batch.select(rows)
    width = batch.tokens.shape[1]
    for name, value in vars(micro).items():
        if isinstance(value, Tensor):
            value = pad_columns(value, width) if value.dim() == 2 else value
            setattr(micro, name, value.to(device, non_blocking=True))
    return micro
