"""The probe: computes exact entropies from the logits that TensorRT-LLM samples from, and keeps them by request and
position.

It wraps `forward` of PyExecutor's model engine. The result's "logits" are those of the whole vocabulary, before
temperature and sampler, outside any CUDA graph: one row for each context request, then one for each generation request,
then padding. A row is kept under the position of the token that it produces, not in the order of arrival: the overlap
scheduler runs one step too many for a finished request, and a paused request is prefilled again, so that a position may
be computed twice. The later row is the one that was sampled from.

Each step of the engine takes O(1) launches and one asynchronous copy of 8 bytes a row. The module runs in the engine's
GPU workers, so that it imports only torch and `ops`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echorl_nemo.ops import entropy_and_max_logprob

DUMMY_MARKS = ("is_dummy_request", "is_attention_dp_dummy", "is_cuda_graph_dummy")
"""Attributes of requests that the engine makes itself (TensorRT-LLM, pyexecutor/llm_request.py)."""
CLOSED = 1 << 16
"""Number of popped or discarded requests that are remembered. Rows that come for them later are dropped."""


@dataclass(frozen=True)
class _Step:
    """The rows of one step of the engine. Their copy to the host may not be complete yet."""

    rows: Tensor
    """[R] int64: indices into `statistics`. They are applied on the host, so that the device is not waited for."""
    requests: Tensor
    """[R] int64: client ids of the requests."""
    positions: Tensor
    """[R] int64: positions of the produced tokens, counted from the prompt's first."""
    statistics: Tensor
    """[rows of the step, 2] float32: entropy and largest log-prob, nats."""
    ready: Any
    """The CUDA event after which the copy is complete; None on the CPU."""


class EntropyProbe:
    """Keeps entropy and largest log-prob of every token that a model engine produces, until they are popped."""

    def __init__(self, model_engine: Any, *, vocab_size: int, temperature: float, max_rows: int) -> None:
        """Wrap ``model_engine.forward``. ``max_rows``: most tokens that may wait to be popped, 24 bytes each."""
        self.vocab_size, self.temperature, self.max_rows = vocab_size, temperature, max_rows
        self.failure = ""
        """Reason why the entropies are wrong, which the next `pop` raises. An error raised inside the engine's loop
        would end the engine without its cause."""
        self._steps: deque[_Step] = deque()
        self._rows = 0
        self._closed: set[int] = set()
        self._closed_order: deque[int] = deque()
        self._model_engine = model_engine
        self._forward: Callable[..., Any] = model_engine.forward
        model_engine.forward = self._watched_forward

    def remove(self) -> None:
        """Remove the probe. Entropies that were not popped are lost."""
        self._model_engine.forward = self._forward
        self._steps.clear()

    def pop(self, requests: Mapping[int, tuple[int, int]]) -> dict[int, Tensor]:
        """The entropy and largest log-prob of each response token, [tokens, 2] float32 nats, by client id.

        ``requests``: numbers of prompt and response tokens by client id. Rows that come for these requests later are
        dropped. Raises RuntimeError with `failure`, or if a token has no row.
        """
        if self.failure:
            raise RuntimeError(self.failure)
        ids, positions, statistics = self._collect()
        order = torch.tensor(sorted(requests), dtype=torch.long)
        prompt, count = (torch.tensor([requests[i][n] for i in order.tolist()], dtype=torch.long) for n in (0, 1))
        slot = torch.searchsorted(order, ids).clamp(max=max(0, len(order) - 1))
        wanted = order[slot] == ids if len(order) else torch.zeros_like(ids, dtype=torch.bool)
        start = count.cumsum(0) - count
        offset = positions - prompt[slot] if len(order) else positions
        inside = wanted & (offset >= 0) & (offset < (count[slot] if len(order) else 0))
        table = torch.full((int(count.sum()), 2), torch.nan)
        place = (start[slot] + offset)[inside] if len(order) else offset[inside]
        latest = _last_of_each(place)
        table[place[latest]] = statistics[inside][latest]
        self._keep(~wanted, ids, positions, statistics)
        self.discard(requests)
        popped = dict(zip(order.tolist(), table.split(count.tolist()), strict=True))
        for request, values in popped.items():
            if missing := int(values[:, 0].isnan().sum()):
                raise RuntimeError(
                    f"request {request}: {missing} of its {len(values)} tokens have no entropy: the probe did not see "
                    "the logits that they were sampled from"
                )
        return popped

    def discard(self, requests: Iterable[int]) -> None:
        """Drop the rows of requests that will not be popped, such as aborted ones."""
        for request in requests:
            self._closed.add(request)
            self._closed_order.append(request)
        while len(self._closed_order) > CLOSED:
            self._closed.discard(self._closed_order.popleft())

    def prune(self) -> int:
        """Drop the rows of popped and discarded requests, and return the number of rows that are left."""
        self._keep(None, *self._collect())
        return self._rows

    def _watched_forward(self, *args: Any, **kwargs: Any) -> Any:
        places: list[tuple[int, int | None, int]] = []
        watched = not self.failure and not getattr(self._model_engine, "is_warmup", False)
        if watched:  # before the call, which changes the requests' state
            with self._noting_failures("the engine's requests cannot be read"):
                places = _places(_scheduled_requests(args, kwargs), _new_tensors(args, kwargs))
        outputs = self._forward(*args, **kwargs)
        if watched and not self.failure:
            with self._noting_failures("the engine's logits cannot be read"):
                self.failure = self._record(places, outputs)
        return outputs

    @contextmanager
    def _noting_failures(self, what: str) -> Iterator[None]:
        """Keep an error as `failure`: raised inside the engine's loop, it would end the engine without its cause."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is, the next `pop` raises it
            self.failure = f"{what}: {type(error).__name__}: {error}; use echorl.entropy_source=policy"

    def _record(self, places: list[tuple[int, int | None, int]], outputs: Any) -> str:
        """Keep the rows of a step. Returns a problem; empty if there is none."""
        if not isinstance(outputs, dict) or "logits" not in outputs:
            return "model_engine.forward returns no logits: this version of TensorRT-LLM is not supported"
        logits = outputs["logits"]
        if not places:
            return ""
        if logits.shape[-1] < self.vocab_size:
            return (
                f"the engine's logits have {logits.shape[-1]} columns, the vocabulary {self.vocab_size} entries: they "
                "are split over ranks; entropies need whole rows, use echorl.entropy_source=policy"
            )
        rows = max(row for row, _, _ in places) + 1
        if len(logits) < rows:
            return f"the engine's logits have {len(logits)} rows for {rows} requests: this layout is not supported"
        if any(client is None for _, client, _ in places):
            return "the engine's requests have no client id: entropies cannot be distinguished"
        statistics = entropy_and_max_logprob(logits[:rows], temperature=self.temperature, vocab_size=self.vocab_size)
        host, ready = _to_host(statistics)
        index = torch.tensor([row for row, _, _ in places])
        clients = torch.tensor([client for _, client, _ in places], dtype=torch.long)
        positions = torch.tensor([position for _, _, position in places], dtype=torch.long)
        self._steps.append(_Step(index, clients, positions, host, ready))
        self._rows += len(places)
        if self._rows > self.max_rows and self.prune() > self.max_rows:
            return (
                f"{self._rows} tokens wait for their entropies to be popped, more than max_rows={self.max_rows}: "
                "finished requests are not popped, or aborted ones not discarded"
            )
        return ""

    def _collect(self) -> tuple[Tensor, Tensor, Tensor]:
        """Client ids, positions and statistics of all rows, in the order of the steps."""
        for step in self._steps:
            if step.ready is not None:
                step.ready.synchronize()
        none = torch.zeros(0, dtype=torch.long)
        steps = list(self._steps) or [_Step(none, none, none, torch.zeros(0, 2), None)]
        return (
            torch.cat([step.requests for step in steps]),
            torch.cat([step.positions for step in steps]),
            torch.cat([step.statistics[step.rows] for step in steps]),
        )

    def _keep(self, wanted: Tensor | None, ids: Tensor, positions: Tensor, statistics: Tensor) -> None:
        closed = torch.isin(ids, torch.tensor(sorted(self._closed), dtype=torch.long))
        kept = ~closed if wanted is None else wanted & ~closed
        self._steps.clear()
        if bool(kept.any()):
            self._steps.append(_Step(torch.arange(int(kept.sum())), ids[kept], positions[kept], statistics[kept], None))
        self._rows = int(kept.sum())


def _places(scheduled_requests: Any, new_tensors: Any) -> list[tuple[int, int | None, int]]:
    """(row of the logits, client id, position of the produced token) for each request that produces a token.

    A chunk of a prompt that is not its last has a row too, and produces nothing; so have requests that the engine makes
    itself, for warm-up and to fill CUDA graphs. With the overlap scheduler the token
    before may still be on the device (`py_batch_idx` is set and the call brings new tensors): the request then counts
    one token less than it has (TensorRT-LLM, pyexecutor/model_engine.py, _prepare_tp_inputs).
    """
    places: list[tuple[int, int | None, int]] = []
    row = 0
    for request in scheduled_requests.context_requests:
        end = request.context_current_position + request.context_chunk_size
        if request.py_return_context_logits:
            row += request.context_chunk_size - 1
        if request.is_last_context_chunk and not _is_dummy(request):
            places.append((row, request.py_client_id, end))
        row += 1
    for request in scheduled_requests.generation_requests:
        in_flight = new_tensors is not None and request.py_batch_idx is not None
        if not _is_dummy(request):
            places.append((row, request.py_client_id, request.max_beam_num_tokens + int(in_flight)))
        row += 1
    return places


def _is_dummy(request: Any) -> bool:
    return any(getattr(request, name, False) for name in DUMMY_MARKS)


def _scheduled_requests(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of forward(scheduled_requests, resource_manager, new_tensors_device=None, ...), whose name is
    `batch` since August 2026."""
    return args[0] if args else kwargs["batch" if "batch" in kwargs else "scheduled_requests"]


def _new_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument `new_tensors_device` of forward, the third."""
    return args[2] if len(args) > 2 else kwargs.get("new_tensors_device")


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    """A copy in host memory, and the CUDA event after which it is complete."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


def _last_of_each(keys: Tensor) -> Tensor:
    """[keys] bool: no later entry has the same key."""
    order = torch.argsort(keys, stable=True)
    ordered = keys[order]
    last = torch.ones_like(keys, dtype=torch.bool)
    last[order[:-1]] = ordered[1:] != ordered[:-1]
    return last
