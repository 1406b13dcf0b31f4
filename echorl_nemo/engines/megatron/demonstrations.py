"""Solutions of the data in a training step: one more rollout of each group (LUFFY), or the beginning of a response that
the prompt already holds (UFT).

Shapes: N rollouts, S positions.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.grpo import AlgoConfig
from echorl_nemo.grpo.demonstrations import hint_length
from echorl_nemo.rollout.batch import RolloutBatch, concatenate
from echorl_nemo.rollout.sampling import rollout_seed

NO_MEMBER = -1
"""In place of a rollout's number in its group, so that a hint draws other numbers than every rollout."""


def with_experts(batch: RolloutBatch, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> RolloutBatch:
    """``batch``, whose rollouts are those of ``prompts`` in order, with the solution of each prompt as the last rollout
    of its group. It is finished, and marked in `RolloutBatch.expert`."""
    batch.expert = torch.zeros(len(batch), dtype=torch.bool)
    if not prompts:
        return batch
    responses = [[*tokenizer.encode_solution(prompt.solution)] for prompt in prompts]
    lengths = torch.tensor([len(p.tokens) + len(r) for p, r in zip(prompts, responses, strict=True)])
    tokens = torch.full((len(prompts), int(lengths.max())), tokenizer.pad_id)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : lengths[row]] = torch.tensor([*prompt.tokens, *response])
        mask[row, len(prompt.tokens) : lengths[row]] = True
    unknown = torch.zeros(tokens.shape)  # the policy's scoring pass fills both in
    experts = RolloutBatch(
        tokens=tokens,
        response_mask=mask,
        lengths=lengths,
        finished=torch.ones(len(prompts), dtype=torch.bool),
        group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
        answers=[prompt.answer for prompt in prompts],
        prompts=[prompt.text for prompt in prompts],
        responses=[prompt.solution for prompt in prompts],
        rows=[prompt.row for prompt in prompts if prompt.row is not None],
        rollout_logprobs=None if batch.rollout_logprobs is None else unknown,
        entropies=None if batch.entropies is None else unknown.clone(),
        expert=torch.ones(len(prompts), dtype=torch.bool),
    )
    size = len(batch) // len(prompts)
    order = [row for n in range(len(prompts)) for row in (*range(n * size, (n + 1) * size), len(batch) + n)]
    return concatenate([batch, experts]).select(order)


def with_hints(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, algo: AlgoConfig, *, step: int, seed: int
) -> list[Prompt]:
    """``prompts`` with the beginning of their solutions behind them, as long as ``step`` wants; `Prompt.hint` says how
    many tokens that is."""
    hinted = []
    for prompt in prompts:
        solution = tokenizer.encode_solution(prompt.solution)[:-1]  # without the stop token
        drawn = rollout_seed(seed, prompt.group_id, NO_MEMBER)
        length = hint_length(len(solution), algo, step=step, seed=drawn)
        hinted.append(replace(prompt, tokens=(*prompt.tokens, *solution[:length]), hint=length))
    return hinted


def mark_hints(batch: RolloutBatch, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> None:
    """Fill in `RolloutBatch.hint_mask`, and put the text of each hint in front of its responses: a verifier reads the
    solution as a whole."""
    size = len(batch) // max(1, len(prompts))
    ends = torch.tensor([len(prompt.tokens) for prompt in prompts]).repeat_interleave(size)
    hints = torch.tensor([prompt.hint for prompt in prompts]).repeat_interleave(size)
    positions = torch.arange(batch.tokens.shape[1])
    batch.hint_mask = (positions >= (ends - hints)[:, None]) & (positions < ends[:, None])
    for row, (end, hint) in enumerate(zip(ends.tolist(), hints.tolist(), strict=True)):
        if hint:
            text = tokenizer.decode(batch.tokens[row, end - hint : end].tolist())
            batch.responses[row] = text + batch.responses[row]
