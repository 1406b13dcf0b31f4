"""The scoring pass: log-probs and exact entropies of rollouts under a Megatron-Core model.

Shapes: N rollouts, S positions, B rollouts of a micro-batch, v vocabulary columns of this tensor-parallel rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from echorl_nemo.engines.megatron.model import PolicyModel
from echorl_nemo.engines.megatron.zigzag import held_positions, round_up
from echorl_nemo.ops import logprob_and_entropy
from echorl_nemo.rollout.batch import RolloutBatch, blank_rollouts, concatenate, pad_columns
from echorl_nemo.rollout.packing import PackedRow, pack_bins, pack_row


@dataclass(frozen=True)
class MicroBatch:
    """What one forward-backward works on."""

    rollouts: RolloutBatch
    row: PackedRow | None
    """The rollouts as one packed row; None if they are padded."""
    held: Tensor | None
    """The columns of the tokens that this context-parallel rank holds; None if it holds them all."""

    def own_columns(self, values: Tensor) -> Tensor:
        """The columns of ``values`` [B, S], or [1, W] for a packed row, that this rank holds."""
        return values if self.held is None else values.index_select(1, self.held)


class MegatronScorer:
    """A Megatron-Core model that scores rollouts. Every rank must call its methods, with the rollouts that it holds."""

    def __init__(
        self,
        model: PolicyModel,
        *,
        temperature: float,
        micro_batch_size: int,
        vocab_size: int | None = None,
        pack_tokens: int = 0,
    ) -> None:
        """``pack_tokens``: as `trainer.pack_tokens`; 0 pads micro-batches of ``micro_batch_size`` rollouts.
        ``vocab_size``: size of the tokenizer's vocabulary; further ids of the model have probability 0."""
        self.model, self.parallel = model, model.parallel
        self.temperature, self.micro_batch_size, self.pack_tokens = temperature, micro_batch_size, pack_tokens
        self.vocab_size = vocab_size
        config = model.config
        # context parallelism cuts each sequence into that many chunks, sequence parallelism the columns of a rank
        self._sequence_multiple = 2 * self.parallel.context_size if self.parallel.context_size > 1 else 1
        self._column_multiple = self._sequence_multiple
        if config.sequence_parallel:
            self._column_multiple *= config.tensor_model_parallel_size
        self._forward_backward: Callable[..., list[Any]] = get_forward_backward_func()

    def score(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens and exact entropies, each [N, S] float32 nats, from the same logits."""
        count, width = batch.tokens.shape
        filled, rows, idle_row = self._filled(batch)
        self.model.ddp.eval()
        with torch.no_grad():
            micro_rows = self._micro_batches(filled, rows)
            micro_rows += self._idle_micro_batches(len(micro_rows), row=idle_row)
            scored = self._run(filled, micro_rows, self._score_logits, forward_only=True)
        order = [row for rows in micro_rows for row in rows]
        shape = (2, len(order), filled.tokens.shape[1])
        flat = torch.cat([_widened(torch.stack(pair), shape[2]) for pair in scored], dim=1) if scored else None
        table = self.parallel.broadcast_from_last_stage(flat, shape, torch.float32).cpu()
        result = torch.zeros(2, len(filled), shape[2])
        result[:, order] = table
        result = result[:, :count, :width] * batch.response_mask
        return result[0], result[1]

    def _filled(self, batch: RolloutBatch) -> tuple[RolloutBatch, list[int], int]:
        """``batch`` with blank rollouts behind it; the rows that fill whole micro-batches; and a blank row.

        Pipeline stages exchange micro-batches of one shape, and a replica without rollouts still takes part in every
        collective.
        """
        filling = self._padding_rows(len(batch))
        rows = list(range(len(batch) + filling))
        if filling or self.parallel.lockstep:
            batch = concatenate([batch, blank_rollouts(batch, max(1, filling))])
        return batch, rows, len(batch) - 1

    def _padding_rows(self, rows: int) -> int:
        """Number of rows to add to ``rows`` so that they fill whole micro-batches, at least one."""
        size = 1 if self.pack_tokens else self.micro_batch_size
        return -rows % size if rows else size

    def _idle_micro_batches(self, micro_batches: int, *, row: int) -> list[list[int]]:
        """Further micro-batches of ``row`` for a replica that has fewer ``micro_batches`` than another one, which needs
        this one's experts in each of its own."""
        missing = self.parallel.max_over_replicas(micro_batches) - micro_batches
        return [[row] * (1 if self.pack_tokens else self.micro_batch_size)] * missing

    def _padded(self, width: int) -> int:
        """``width`` rounded up so that context and sequence parallelism split the columns evenly."""
        return round_up(width, self._column_multiple)

    def _packed_lengths(self, batch: RolloutBatch, rows: list[int]) -> list[int]:
        """Tokens that each of ``rows`` takes of a packed row, padding for context parallelism included."""
        return [round_up(length, self._sequence_multiple) for length in batch.lengths[rows].tolist()]

    def _micro_batches(self, batch: RolloutBatch, rows: list[int]) -> list[list[int]]:
        """``rows`` of ``batch`` split into those of each forward-backward."""
        if self.pack_tokens:
            capacity = round_up(self.pack_tokens, self._sequence_multiple)
            return [[rows[i] for i in part] for part in pack_bins(self._packed_lengths(batch, rows), capacity)]
        size = self.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _run(
        self,
        batch: RolloutBatch,
        micro_rows: list[list[int]],
        use_logits: Callable[[Tensor, MicroBatch], Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron's pipeline schedule over the micro-batches. Returns the results of ``use_logits`` for each on
        the last pipeline stage, an empty list on others."""
        # pipeline stages exchange micro-batches of one shape; elsewhere each is as wide as its own longest rollout
        width = self._padded(batch.tokens.shape[1])
        own_width = self.model.config.pipeline_model_parallel_size == 1
        packed_width = self._padded(max(sum(self._packed_lengths(batch, rows)) for rows in micro_rows))

        def forward_step(rows: Iterator[list[int]], module: Any) -> tuple[Tensor, Callable[..., Any]]:
            chosen = next(rows)
            columns = self._padded(int(batch.lengths[chosen].max())) if own_width else width
            rollouts = _on_device(batch, chosen, columns, self.parallel.device)
            row = None
            if self.pack_tokens:
                row = pack_row(rollouts.tokens, self._packed_lengths(batch, chosen), packed_width)
            micro = MicroBatch(rollouts, row, self._held_positions([columns] if row is None else row.sizes))
            output = self._forward(module, micro)
            return output, lambda logits, non_loss_data=False: use_logits(logits, micro)

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(micro_rows),
            model=[self.model.ddp],
            num_microbatches=len(micro_rows),
            seq_length=packed_width if self.pack_tokens else width,
            micro_batch_size=1 if self.pack_tokens else len(micro_rows[0]),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _held_positions(self, sizes: Sequence[int]) -> Tensor | None:
        parallel = self.parallel
        if parallel.context_size == 1:
            return None
        return held_positions(sizes, parallel.context_size, parallel.context_rank).to(parallel.device)

    def _forward(self, module: Any, micro: MicroBatch) -> Tensor:
        """The output of this pipeline stage; on the last one logits [B, S, v], or [1, W, v] for a packed row, of the
        positions that this rank holds."""
        tokens, row, sequences = micro.rollouts.tokens, micro.row, {}
        if row is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        else:
            tokens, positions = row.tokens, row.positions
            sequences["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=row.cu_seqlens,
                cu_seqlens_kv=row.cu_seqlens,
                max_seqlen_q=row.longest,
                max_seqlen_kv=row.longest,
            )
        return module(
            micro.own_columns(tokens), micro.own_columns(positions), None, **sequences, **self.model.call_options
        )

    def _all_columns(self, values: Tensor, micro: MicroBatch, width: int) -> Tensor:
        """``values`` [n, B, columns of this rank] with the columns of all ranks of the context group, [n, B, width].

        Each rank then computes the whole loss, and its backward goes only to the logits that it holds."""
        if micro.held is None:
            return values
        whole = values.new_zeros(*values.shape[:2], width).index_copy(2, micro.held, values)
        return reduce_from_tensor_model_parallel_region(whole, group=self.parallel.context_group)

    def _score_logits(self, logits: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._token_statistics(logits, micro, train=False)

    def _token_statistics(
        self, logits: Tensor, micro: MicroBatch, *, train: bool, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each [B, S], aligned to the token that the distribution produced: of the response,
        log-probs also of a hint."""
        rollouts, row = micro.rollouts, micro.row
        # position t's logits produce token t + 1; the last ones are not used
        produced = rollouts.tokens.roll(-1, dims=1)
        if row is not None:
            produced = row.pack(produced)
        logprobs, entropies = logprob_and_entropy(
            logits,
            micro.own_columns(produced),
            group=self.parallel.tensor_group,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            entropy_grad=entropy_grad,
            inplace_backward=train,
        )
        logprobs, entropies = self._all_columns(torch.stack([logprobs, entropies]), micro, produced.shape[1])
        if row is not None:
            logprobs, entropies = row.unpack(logprobs), row.unpack(entropies)
        # one column to the right; where() rather than a product, since 0 * -inf is NaN
        aligned = [torch.nn.functional.pad(values[:, :-1], (1, 0)) for values in (logprobs, entropies)]
        response = rollouts.response_mask
        scored = response if rollouts.hint_mask is None else response | rollouts.hint_mask
        return (
            torch.where(scored, aligned[0], 0.0),
            torch.where(response, aligned[1], 0.0),
        )


def _widened(values: Tensor, width: int) -> Tensor:
    """``values`` [2, B, columns] cut or padded with zeros to ``width`` columns."""
    return torch.nn.functional.pad(values, (0, max(0, width - values.shape[2])))[:, :, :width]


def _on_device(batch: RolloutBatch, rows: list[int], width: int, device: torch.device) -> RolloutBatch:
    """The rollouts ``rows`` of ``batch`` on ``device``, with ``width`` columns each."""
    micro = batch.select(rows)
    for name, value in vars(micro).items():
        if isinstance(value, Tensor):
            value = pad_columns(value, width) if value.dim() == 2 else value
            setattr(micro, name, value.to(device, non_blocking=True))
    return micro
