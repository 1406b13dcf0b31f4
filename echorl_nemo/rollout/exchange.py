"""Sends rollouts between ranks, point to point: each rank gets only the rollouts that it needs."""

import pickle
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from echorl_nemo.rollout.batch import RolloutBatch

PIECE = 4 << 20
"""Bytes that a rank of a chain receives before it passes them on."""
TOKEN_BYTES = 13
"""Bytes of a token of a packed rollout: its id, mask, log-prob and entropy."""


def pack_rollouts(batch: RolloutBatch | None) -> bytes:
    """``batch`` as bytes: `TOKEN_BYTES` for each of the N x S tokens of a rollout with log-probs and entropies, and the
    texts."""
    assert batch is not None
    changed: dict[str, object] = {"tokens": batch.tokens.to(torch.int32)}
    for spec in fields(batch):
        value = changed.get(spec.name, getattr(batch, spec.name))
        if isinstance(value, Tensor):  # a view would be pickled with all that lies behind it
            changed[spec.name] = value.numpy().copy()
        elif isinstance(value, dict):
            changed[spec.name] = {name: part.numpy().copy() for name, part in value.items()}
    return pickle.dumps(replace(batch, **changed))  # type: ignore[arg-type]


def unpack_rollouts(data: bytes) -> RolloutBatch:
    """The rollouts that `pack_rollouts` packed."""
    batch: RolloutBatch = pickle.loads(data)
    for spec in fields(batch):
        value = getattr(batch, spec.name)
        if hasattr(value, "dtype"):
            setattr(batch, spec.name, torch.from_numpy(value))
        elif isinstance(value, dict):
            setattr(batch, spec.name, {name: torch.from_numpy(part) for name, part in value.items()})
    batch.tokens = batch.tokens.long()
    return batch


def exchange_bytes(parts: Sequence[bytes], group: dist.ProcessGroup, receivers: Sequence[int]) -> list[bytes]:
    """Send ``parts[i]`` to the rank ``receivers[i]`` of ``group``, over gloo, and return what this rank receives from
    each other rank, in their order. Nothing is sent for an empty part. Every rank of the group must call this."""
    own, size = group.rank(), group.size()
    lengths = torch.zeros(size, dtype=torch.long)
    for receiver, part in zip(receivers, parts, strict=True):
        lengths[receiver] = len(part)
    table = [torch.zeros_like(lengths) for _ in range(size)]
    dist.all_gather(table, lengths, group=group)
    ranks = dist.get_process_group_ranks(group)
    pending, buffers, sent = [], {}, []  # `sent` keeps the memory until it has gone
    for sender in range(size):
        if sender != own and int(table[sender][own]):
            buffers[sender] = torch.empty(int(table[sender][own]), dtype=torch.uint8)
            pending.append(dist.irecv(buffers[sender], src=ranks[sender], group=group))
    for receiver, part in zip(receivers, parts, strict=True):
        if receiver != own and part:
            sent.append(_tensor(part))
            pending.append(dist.isend(sent[-1], dst=ranks[receiver], group=group))
    for work in pending:
        assert work is not None
        work.wait()
    return [buffers[sender].numpy().tobytes() for sender in sorted(buffers)]


def broadcast_bytes(data: bytes | None, group: dist.ProcessGroup) -> bytes:
    """Send ``data`` of the first rank of ``group``, over gloo, to every rank of it, and return it. Others pass None.

    Each rank passes it on to the next one, piece by piece, so that none sends it more than once.
    """
    ranks, own = dist.get_process_group_ranks(group), group.rank()
    size = torch.tensor([len(data or b"")])
    dist.broadcast(size, src=ranks[0], group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8) if data is None else _tensor(data)
    pending = []
    for piece in buffer.split(PIECE):
        if own > 0:
            dist.recv(piece, src=ranks[own - 1], group=group)
        if own + 1 < len(ranks):
            pending.append(dist.isend(piece, dst=ranks[own + 1], group=group))
    for work in pending:
        assert work is not None
        work.wait()
    return data if data is not None else buffer.numpy().tobytes()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
