"""Entropies from the log-prob pass: vocabulary split, sequence split, packed."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from tests.engines.nemo_rl.conftest import REAL

SHAPE = (3, 10)
LENGTHS = [10, 5, 7]


def whole_logits() -> Tensor:
    return torch.randn(*SHAPE, 16, generator=torch.Generator().manual_seed(1)) * 3


def expected() -> Tensor:
    logs = whole_logits().double().log_softmax(dim=-1)
    entropies = -(logs.exp() * logs).sum(dim=-1)
    return torch.nn.functional.pad(entropies[:, :-1], (1, 0)).float()


def packed_row(pad_to: int) -> tuple[Tensor, Tensor]:
    """([1, T, 16] logits of the sequences in a row, each padded to a multiple of ``pad_to``; their starts)."""
    logits, parts, starts = whole_logits(), [], [0]
    for row, length in zip(logits, LENGTHS, strict=True):
        padding = -length % pad_to
        parts.append(torch.nn.functional.pad(row[:length], (0, 0, 0, padding)))
        starts.append(starts[-1] + length + padding)
    return torch.cat(parts)[None], torch.tensor(starts, dtype=torch.int32)


def zigzag(sequence: Tensor, rank: int, world: int) -> Tensor:
    chunks = sequence.chunk(2 * world, dim=1)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim=1)


def _entropies(tensor: int, context: int, packed: bool) -> Tensor:
    from echorl_nemo.engines.nemo_rl.entropy import EchoLogprobsPostProcessor

    parallel_state.initialize_model_parallel(tensor, context_parallel_size=context)
    collected: list[Tensor] = []
    processor = EchoLogprobsPostProcessor(cfg={"sequence_packing": {"enabled": packed}}, collected=collected)
    logits, starts = packed_row(2 * context) if packed else (whole_logits(), None)
    length = logits.shape[1]
    if context > 1:
        assert starts is not None
        rank = parallel_state.get_context_parallel_rank()
        parts = [zigzag(logits[:, start:end], rank, context) for start, end in pairwise(starts.tolist())]
        logits = torch.cat(parts, dim=1)
    shard = logits.chunk(tensor, dim=-1)[parallel_state.get_tensor_model_parallel_rank()].contiguous()
    data: Any = {"input_ids": torch.zeros(SHAPE, dtype=torch.long)}
    ids = torch.zeros(1, length, dtype=torch.long) if packed else data["input_ids"]
    _, output = processor(data_dict=data, input_ids=ids, cu_seqlens_padded=starts)(shard)
    assert output["logprobs"].shape == SHAPE
    return collected[0]


@pytest.mark.parametrize(
    ("tensor", "context", "packed"),
    [(1, 1, False), (2, 1, False), (1, 1, True), (2, 1, True), (1, 2, True), (2, 2, True)],
)
def test_entropies_are_exact(ranks: Callable[..., list[Any]], tensor: int, context: int, packed: bool) -> None:
    exact = expected()
    if packed:  # the padding of a row is not computed
        exact *= torch.arange(SHAPE[1]) < torch.tensor(LENGTHS)[:, None]
    for entropies in ranks(tensor * context, _entropies, tensor, context, packed):
        if packed:
            entropies = entropies * (torch.arange(SHAPE[1]) < torch.tensor(LENGTHS)[:, None])
        torch.testing.assert_close(entropies, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(REAL, reason="the real worker needs a GPU")
def test_the_worker_returns_them_beside_the_log_probs(ranks: Callable[..., list[Any]]) -> None:
    (result,) = ranks(1, _worker)
    entropies, reference_keys = result
    exact = expected()
    torch.testing.assert_close(entropies[:, : SHAPE[1]], exact, rtol=2e-6, atol=2e-6)
    assert reference_keys == ["reference_logprobs"]


def _worker() -> tuple[Tensor, list[str]]:
    from echorl_nemo.engines.nemo_rl.worker import EchoMegatronPolicyWorkerImpl

    assert dist.is_initialized()
    parallel_state.initialize_model_parallel(1)
    worker = EchoMegatronPolicyWorkerImpl()
    worker.cfg = {"sequence_packing": {"enabled": False}}
    rows = whole_logits()
    # micro-batches of 2 rows, then 1, as long as their longest sequence
    worker.model = lambda ids: rows[ids[:, 0], : ids.shape[1]]
    data = {
        "input_ids": torch.arange(3)[:, None].expand(-1, 12).contiguous(),
        "input_lengths": torch.tensor([10, 8, 10]),
    }
    result = worker.get_logprobs(data=data)
    assert result["logprobs"].shape == result["entropies"].shape == (3, 12)
    return result["entropies"], sorted(worker.get_reference_policy_logprobs(data=data))
