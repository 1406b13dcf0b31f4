"""Rollout engine `megatron`: the policy itself generates, with Megatron-Core's inference context.

Prompts of different lengths share a batch without padding: the batch is prefilled up to its shortest prompt, and a
longer prompt's tokens are fed one by one where others already sample.

Shapes: B rollouts of a generation batch, A of them active, S positions, V vocabulary entries.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.inference.communication_utils import recv_from_prev_pipeline_rank_, send_to_next_pipeline_rank
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.engines.megatron.context import whole_sequences
from echorl_nemo.engines.megatron.model import PolicyModel
from echorl_nemo.ops import logprob_and_entropy
from echorl_nemo.rollout.batch import RolloutBatch, concatenate
from echorl_nemo.rollout.config import RolloutConfig
from echorl_nemo.rollout.engine import WeightSource
from echorl_nemo.rollout.sampling import rollout_uniforms, sample_tokens

COMPACT_SHARE = 0.2
"""Share of finished rollouts at which they are removed from the batch and the KV cache. Each removal copies the
cache."""


class MegatronRolloutEngine:
    """Generates with the weights of the policy that is trained, so that no weights are transferred."""

    def __init__(self, model: PolicyModel, tokenizer: Tokenizer, config: RolloutConfig) -> None:
        self.model, self.parallel, self.tokenizer, self.config = model, model.parallel, tokenizer, config
        self.vocab_size = len(tokenizer)
        """Number of ids that may be sampled: those of the tokenizer. Further ids of the model have no text."""
        self._stop = torch.tensor(tokenizer.stop_ids, device=self.parallel.device)

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, temperature: float | None = None
    ) -> RolloutBatch:
        """See `RolloutEngine.generate`."""
        shard = self.parallel.generation_shard(len(prompts))
        rows = [(prompts[i], member) for i in shard for member in range(group_size)]
        by_length = sorted(
            range(len(rows)), key=lambda i: len(rows[i][0].tokens)
        )  # so that a batch has similar lengths
        size = self.config.batch_size
        self.model.ddp.eval()
        parts = []
        with torch.no_grad(), whole_sequences(self.model), _whole_positions(self.model):
            heat = self.config.temperature if temperature is None else temperature
            batches = -(-len(rows) // size)
            for number in range(self.parallel.max_over_replicas(batches)):
                chosen = by_length[number * size : (number + 1) * size]
                # a replica without rollouts runs the same number of batches, and its result is dropped
                mine_here = [rows[i] for i in chosen] or [(prompts[0], 0)]
                part = _Decoding(self, mine_here, seed, heat).run()
                if number < batches:
                    parts.append(part)
        mine = _no_rollouts()
        if parts:
            back_in_order = torch.tensor(by_length).argsort()
            mine = concatenate(parts).select(back_in_order)
        if self.parallel.context_size == 1:
            return mine
        return self.parallel.exchange_rollouts(mine, [prompt.group_id for prompt in prompts])

    def update_weights(self, policy: WeightSource) -> None:
        """Does nothing: the weights are the policy's own."""

    def sleep(self) -> None:
        """Does nothing: the KV cache is freed at the end of each batch."""

    def wake(self) -> None:
        """Does nothing: the KV cache is allocated at the start of each batch."""

    def close(self) -> None:
        """Does nothing: this engine starts no process."""


def _no_rollouts() -> RolloutBatch:
    """What a replica generates that has no prompt."""
    integers, flags = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
    return RolloutBatch(
        tokens=integers.view(0, 0),
        response_mask=flags.view(0, 0),
        lengths=integers,
        finished=flags,
        group_ids=integers,
        rollout_logprobs=torch.zeros(0, 0),
        entropies=torch.zeros(0, 0),
    )


@contextmanager
def _whole_positions(model: PolicyModel) -> Iterator[None]:
    """Turn sequence parallelism off meanwhile, since one token at a time cannot be split over ranks. The layers of
    experts keep it: they gather and split the tokens themselves."""
    if not model.config.sequence_parallel:
        yield
        return
    set_model_to_sequence_parallel(model.module, False, exclude_modules=[BaseMoELayer])
    yield
    set_model_to_sequence_parallel(model.module, True, exclude_modules=[BaseMoELayer])


@dataclass
class _Decoding:
    """One generation batch, from prefill to the last stop token. All ranks of the replica run the same steps."""

    engine: MegatronRolloutEngine
    rows: list[tuple[Prompt, int]]
    """(prompt, place in its group) of each rollout."""
    seed: int
    temperature: float

    def __post_init__(self) -> None:
        budget, device = self.engine.config.max_new_tokens, self.engine.parallel.device
        prompts = [prompt.tokens for prompt, _ in self.rows]
        count, self.width = len(self.rows), max(map(len, prompts)) + budget
        self.prompt_lengths = torch.tensor([len(tokens) for tokens in prompts], device=device)
        self.tokens = torch.full((count, self.width), self.engine.tokenizer.pad_id, device=device)
        for row, tokens in enumerate(prompts):
            self.tokens[row, : len(tokens)] = torch.tensor(tokens, device=device)
        self.uniforms = torch.stack(
            [rollout_uniforms(self.seed, prompt.group_id, member, budget) for prompt, member in self.rows]
        ).to(device)
        self.lengths = self.prompt_lengths.clone()
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self.statistics = torch.zeros(
            2, count, self.width, device=device
        )  # log-probs and entropies, on `last_stage_rank`

    def run(self) -> RolloutBatch:
        context = StaticInferenceContext(len(self.rows), self.width)
        active = torch.arange(len(self.rows), device=self.tokens.device)  # batch row of each row of the KV cache
        start, end = 0, int(self.prompt_lengths.min())
        while True:
            logits = self._forward(self.tokens[active, start:end], start, context)
            self._extend(active, logits, end)
            done = self.finished[active] | (self.lengths[active] - self.prompt_lengths[active] >= self._budget)
            if bool(done.all()):
                self._wait_in_step(active, end - 1, context)
                return self._collect()
            self._say_that_more_follows()
            if float(done.float().mean()) >= COMPACT_SHARE:
                active = self._drop(active, ~done, context)
            start, end = end, end + 1

    def _say_that_more_follows(self) -> None:
        """Let replicas that are done, and share experts with this one, know that one more forward follows."""
        self.engine.parallel.max_over_replicas(1)

    def _wait_in_step(self, active: Tensor, position: int, context: StaticInferenceContext) -> None:
        """Repeat the forward of the token at ``position`` with one rollout until every replica that shares experts with
        this one is done: this rank's experts serve their tokens."""
        first = torch.zeros(len(active), dtype=torch.bool, device=active.device)
        first[0] = True
        while self.engine.parallel.lockstep and self.engine.parallel.max_over_replicas(0):
            if len(active) > 1:
                active, first = self._drop(active, first, context), first[:1]
            context.sequence_len_offset = position
            self._forward(self.tokens[active, position : position + 1], position, context)

    @property
    def _budget(self) -> int:
        return self.engine.config.max_new_tokens

    def _forward(self, tokens: Tensor, start: int, context: StaticInferenceContext) -> Tensor | None:
        """Logits [A, V] of the last position, on the last pipeline stage; ``tokens`` [A, new positions]."""
        model, parallel = self.engine.model, self.engine.parallel
        rows, new = tokens.shape
        if not parallel.is_first_stage:
            shape = (new, rows, model.config.hidden_size)
            hidden = torch.empty(shape, dtype=model.config.pipeline_dtype, device=parallel.device)
            recv_from_prev_pipeline_rank_(hidden)
            model.module.set_input_tensor(hidden)
        positions = torch.arange(start, start + new, device=tokens.device).expand_as(tokens)
        output = model.module(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(new)
        if not parallel.is_last_stage:
            send_to_next_pipeline_rank(output)
            return None
        logits: Tensor = output[:, -1, : self.engine.vocab_size]
        return logits

    def _extend(self, active: Tensor, logits: Tensor | None, position: int) -> None:
        """Write each active rollout's token at ``position``: its prompt's, or a sampled one."""
        sampling = (self.prompt_lengths[active] <= position) & ~self.finished[active]
        sampling &= self.lengths[active] - self.prompt_lengths[active] < self._budget
        chosen = None
        if logits is not None:
            place = (position - self.prompt_lengths[active]).clamp(0, self._budget - 1)
            chosen = sample_tokens(
                logits,
                self.uniforms[active, place],
                temperature=self.temperature,
                top_p=self.engine.config.top_p,
                top_k=self.engine.config.top_k,
            )
        # every rank must continue with the same token: the one that `last_stage_rank` chose
        chosen = self.engine.parallel.broadcast_from_last_stage(chosen, active.shape, torch.long)
        if logits is not None:
            logprobs, entropies = logprob_and_entropy(logits, chosen, temperature=self.temperature or 1.0)
            self.statistics[:, active, position] = torch.stack([logprobs, entropies]) * sampling
        self.tokens[active, position] = torch.where(sampling, chosen, self.tokens[active, position])
        self.lengths[active] += sampling
        self.finished[active] |= sampling & torch.isin(chosen, self.engine._stop)

    def _drop(self, active: Tensor, keep: Tensor, context: StaticInferenceContext) -> Tensor:
        """Remove all rollouts but those in ``keep`` from the batch and from the KV cache."""
        for layer, (keys, values) in context.key_value_memory_dict.items():
            context.key_value_memory_dict[layer] = (keys[:, keep], values[:, keep])
        active = active[keep]
        context.max_batch_size = len(active)
        return active

    def _collect(self) -> RolloutBatch:
        width = int(self.lengths.max())
        statistics = self.engine.parallel.broadcast_from_last_stage(
            self.statistics, self.statistics.shape, torch.float32
        )[:, :, :width].cpu()
        tokens, lengths, prompt_lengths = self.tokens[:, :width].cpu(), self.lengths.cpu(), self.prompt_lengths.cpu()
        positions = torch.arange(width)
        response_mask = (positions >= prompt_lengths[:, None]) & (positions < lengths[:, None])
        return RolloutBatch(
            tokens=tokens,
            response_mask=response_mask,
            lengths=lengths,
            finished=self.finished.cpu(),
            group_ids=torch.tensor([prompt.group_id for prompt, _ in self.rows]),
            answers=[prompt.answer for prompt, _ in self.rows],
            prompts=[prompt.text for prompt, _ in self.rows],
            rows=[prompt.row for prompt, _ in self.rows if prompt.row is not None],
            responses=[
                self.engine.tokenizer.decode(row[mask].tolist())
                for row, mask in zip(tokens, response_mask, strict=True)
            ],
            rollout_logprobs=statistics[0],
            entropies=statistics[1],
        )
