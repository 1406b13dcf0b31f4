"""Data that is exchanged with TensorRT-LLM: requests and what they give, and weights in buckets."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.rollout.batch import RolloutBatch

ABORT_SECONDS = 60.0
"""Time in which the engine answers a request that is aborted; one that waits in its queue is not answered."""


@dataclass(frozen=True)
class Rollout:
    """One finished request."""

    tokens: list[int]
    """Token ids of the response."""
    logprobs: list[float] | None
    """Log-probs of the tokens, nats; None if the engine did not return them."""
    statistics: Tensor
    """[tokens, 2] nats: entropy and largest log-prob of each token, from the probe."""
    finished: bool
    top_logprobs: list[float] | None
    """The engine's own largest log-probs, nats, for a request that is checked."""


NO_ROLLOUT = Rollout([], [], torch.zeros(0, 2), False, None)
"""A request that the engine had not begun at its time limit."""


async def answer_in_time(pending: Any, seconds: float | None) -> tuple[Any, bool]:
    """(the RequestOutput of ``pending``, whether it was late and is aborted). ``seconds``: time limit; None is none.

    The engine answers an aborted request with the tokens that it has, and one that it has not begun not at all: its
    output is None.
    """

    async def awaited() -> Any:
        return await pending

    answer = asyncio.ensure_future(awaited())
    try:
        done, _ = await asyncio.wait([answer], timeout=seconds)
        if done:
            return answer.result(), False
        pending.abort()
        done, _ = await asyncio.wait([answer], timeout=ABORT_SECONDS)
        return (answer.result() if done else None), True
    finally:
        answer.cancel()


def known_tokens(result: Any) -> list[int]:
    """The tokens of a completion. An aborted one may have a token more than log-probs, or one less (TensorRT-LLM,
    executor/result.py, GenerationResultBase._handle_sequence)."""
    tokens = list(result.token_ids)
    return tokens[: len(result.logprobs)] if result.finish_reason == "cancelled" and result.logprobs else tokens


def token_logprobs(tokens: Sequence[int], given: Any) -> tuple[list[float] | None, list[float] | None]:
    """(log-probs of the sampled tokens, largest log-probs), each None if it is not known.

    ``given``: what the engine returned, a number for each token, or a dictionary by token id of the top-K (in newer
    versions the sampled token is among them).
    """
    if not given:
        return ([], None) if not tokens else (None, None)
    if isinstance(given[0], (int, float)):
        return [float(value) for value in given], None
    top = [max(float(entry.logprob) for entry in entries.values()) for entries in given]
    if any(token not in entries for token, entries in zip(tokens, given, strict=True)):
        return None, top
    return [float(entries[token].logprob) for token, entries in zip(tokens, given, strict=True)], top


def rollout_batch(
    rows: Sequence[tuple[Prompt, int]], rollouts: Sequence[Rollout], tokenizer: Tokenizer
) -> RolloutBatch:
    """The ``rollouts`` of ``rows``, (prompt, place in its group), as a batch; log-probs are 0 where they are not
    known."""
    prompts = torch.tensor([len(prompt.tokens) for prompt, _ in rows])
    lengths = prompts + torch.tensor([len(rollout.tokens) for rollout in rollouts])
    width = int(lengths.max())
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    logprobs, entropies = torch.zeros(2, len(rows), width)
    for row, ((prompt, _), rollout) in enumerate(zip(rows, rollouts, strict=True)):
        start, end = int(prompts[row]), int(lengths[row])
        tokens[row, :end] = torch.tensor([*prompt.tokens, *rollout.tokens])
        entropies[row, start:end] = rollout.statistics[:, 0]
        if rollout.logprobs is not None:
            logprobs[row, start:end] = torch.tensor(rollout.logprobs)
    positions = torch.arange(width)
    return RolloutBatch(
        tokens=tokens,
        response_mask=(positions >= prompts[:, None]) & (positions < lengths[:, None]),
        lengths=lengths,
        finished=torch.tensor([rollout.finished for rollout in rollouts]),
        group_ids=torch.tensor([prompt.group_id for prompt, _ in rows]),
        answers=[prompt.answer for prompt, _ in rows],
        prompts=[prompt.text for prompt, _ in rows],
        responses=[tokenizer.decode(rollout.tokens) for rollout in rollouts],
        rows=[prompt.row for prompt, _ in rows if prompt.row is not None],
        rollout_logprobs=logprobs,
        entropies=entropies,
    )


def weight_buckets(weights: Iterator[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group the weights, in order, into lists of at most ``size`` bytes; a larger weight has a list of its own."""
    bucket: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in weights:
        if bucket and used + tensor.nbytes > size:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor))
        used += tensor.nbytes
    if bucket:
        yield bucket
