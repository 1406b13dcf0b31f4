"""The executor of TensorRT-LLM's stub: requests, the model engine with a transformers model behind it, and the loop.

Like the real one: chunked prefill with a row of logits for every context request; generation rows after them; rows of
padding for CUDA graphs; the overlap scheduler, which launches a step before the tokens of the one before are known, and
so one step too many for a finished request; requests that are paused and prefilled again, their token in flight
discarded; aborts; client ids; logits before temperature, in bf16 if asked, -inf for masked entries; weights that are
reloaded in parts; requests that the engine makes itself.
"""

import asyncio
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor


@dataclass
class Behaviour:
    """What the stub does besides generating."""

    chunk_tokens: int = 5
    """Prompt tokens of a request that one step prefills."""
    max_active: int = 64
    step_seconds: float = 0.0
    """Time that a step takes."""
    overlap: bool = True
    pause: float = 0.0
    """Probability for each step that a running request is paused."""
    padding_rows: int = 3
    dtype: torch.dtype = torch.float32
    masked: tuple[int, ...] = ()
    """Vocabulary entries whose logits are -inf."""
    # faults
    drop_logits: bool = False
    shard_logits: bool = False
    no_client_ids: bool = False
    shift_rows: bool = False
    """The sampler takes other rows than the requests'."""
    spec_decode: bool = False
    dies_after: int | None = None
    """Steps of an engine after which its workers are dead."""
    hangs_after: int | None = None
    """Steps of an engine after which it stands still."""
    faulty_engines: int = 1
    """The first engines, which have those two faults."""
    fail_refit_after: int | None = None
    """Buckets that are taken over before one fails."""
    lost_weights: tuple[str, ...] = ()
    """Beginnings of names of weights that a refit does not load, without an error."""
    warm_up_again: bool = False
    """Every step comes after one of warm-up, and with a request that fills a CUDA graph."""


BEHAVIOUR = Behaviour()


@dataclass
class LlmRequest:
    """What the probe reads of a request, and what the stub needs."""

    py_client_id: int | None
    tokens: list[int]
    """Prompt and known response tokens."""
    prompt_length: int
    parameters: Any
    generator: torch.Generator
    context_current_position: int = 0
    context_length: int = 0
    """Tokens to prefill: the prompt's, and after a pause those generated so far."""
    py_batch_idx: int | None = None
    py_return_context_logits: bool = False
    is_cuda_graph_dummy: bool = False
    in_flight: int | None = None
    """A sampled token that the host does not know yet."""
    logprobs: list[Any] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish_reason: str | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def context_chunk_size(self) -> int:
        return min(BEHAVIOUR.chunk_tokens, self.context_length - self.context_current_position)

    @property
    def is_last_context_chunk(self) -> bool:
        return self.context_current_position + self.context_chunk_size >= self.context_length

    @property
    def in_context(self) -> bool:
        return self.context_current_position < self.context_length

    @property
    def max_beam_num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def response(self) -> list[int]:
        return self.tokens[self.prompt_length :]


class ModelLoader:
    def __init__(self) -> None:
        self.buckets = 0

    def reload(self, model: Any, weights: dict[str, Tensor], allow_partial_loading: bool = False) -> None:
        if BEHAVIOUR.fail_refit_after is not None and self.buckets >= BEHAVIOUR.fail_refit_after:
            raise RuntimeError("out of memory")
        self.buckets += 1
        weights = {
            name: value for name, value in weights.items() if not name.startswith(BEHAVIOUR.lost_weights or ("?",))
        }
        _, unexpected = model.load_state_dict(weights, strict=not allow_partial_loading)
        assert not unexpected, unexpected


class AugustModelLoader(ModelLoader):
    """Loads only between `begin_update_weights` and `finalize_update_weights`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.open = False

    def begin_update_weights(self) -> None:
        assert not self.open
        self.open = True
        self.calls.append("begin")

    def finalize_update_weights(self) -> None:
        assert self.open
        self.open = False
        self.calls.append("finalize")

    def abort_update_weights(self) -> None:
        self.open = False
        self.calls.append("abort")

    def reload(self, model: Any, weights: dict[str, Tensor], allow_partial_loading: bool = False) -> None:
        assert self.open, "reload without begin_update_weights"
        super().reload(model, weights, allow_partial_loading)


class ModelEngine:
    def __init__(self, path: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
        self.model_loader = ModelLoader()
        self.is_warmup = False
        self.is_spec_decode = BEHAVIOUR.spec_decode
        self.forwards = 0

    @torch.no_grad()
    def forward(
        self, scheduled_requests: Any, resource_manager: Any, new_tensors_device: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """A row for every context request and every generation request, then padding."""
        self.forwards += 1
        rows = []
        for request in scheduled_requests.context_requests:
            rows.append(request.tokens[: request.context_current_position + request.context_chunk_size])
            request.py_batch_idx = 0
        for request in scheduled_requests.generation_requests:
            known = new_tensors_device is None or request.py_batch_idx is None
            rows.append(request.tokens if known else [*request.tokens, new_tensors_device[id(request)]])
            request.py_batch_idx = 0
        logits = self._last_logits(rows)
        logits[:, list(BEHAVIOUR.masked)] = -torch.inf
        if not scheduled_requests.context_requests:
            logits = torch.cat([logits, torch.randn(BEHAVIOUR.padding_rows, logits.shape[1], dtype=logits.dtype)])
        if BEHAVIOUR.shard_logits:
            logits = logits.chunk(2, dim=1)[0]
        return {} if BEHAVIOUR.drop_logits else {"logits": logits}

    def _last_logits(self, rows: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, values in zip(tokens, rows, strict=True):
            row[: len(values)] = torch.tensor(values)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        logits = self.model(tokens, attention_mask=mask.long()).logits
        return logits[torch.arange(len(rows)), lengths - 1].to(BEHAVIOUR.dtype)


class AugustModelEngine(ModelEngine):
    """Its forward calls the requests `batch`; a compiled model is unwrapped for a refit, and restored."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.model_loader: AugustModelLoader = AugustModelLoader()

    def forward(  # type: ignore[override]
        self, batch: Any, resource_manager: Any, new_tensors_device: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        return super().forward(batch, resource_manager, new_tensors_device, **kwargs)

    def unwrap_compiled_model_for_refit(self) -> None:
        self.model_loader.calls.append("unwrap")

    def restore_compiled_model_after_refit(self, resource_manager: Any) -> None:
        assert resource_manager == "resources"
        self.model_loader.calls.append("restore")


class PyExecutor:
    """Steps through the requests; see the module's text for what it imitates."""

    model_engine_class: type[ModelEngine] = ModelEngine

    def __init__(self, path: str) -> None:
        self.model_engine = self.model_engine_class(path)
        self.resource_manager = "resources"
        self.active: list[LlmRequest] = []
        self.waiting: list[LlmRequest] = []
        self._pending: list[tuple[LlmRequest, Tensor, int]] = []
        self._random = torch.Generator().manual_seed(0)
        self.prefix_resets = 0
        self.stale_prefixes = False
        """Memory was released, and what its blocks held forgotten."""
        self.paused = self.extra_rows = 0

    @contextmanager
    def control_action(self) -> Iterator[None]:
        assert not self.active and not self._pending, "requests are running"
        yield

    def reset_prefix_cache(self) -> None:
        self.prefix_resets += 1
        self.stale_prefixes = False

    def step(self) -> None:
        assert not self.stale_prefixes, "the prefix cache was used after its memory had been released"
        while self.waiting and len(self.active) < BEHAVIOUR.max_active:
            self.active.append(self.waiting.pop(0))
        self._pause_one()
        context = [request for request in self.active if request.in_context]
        # those without a token in flight come first, as in the real batch
        generation = sorted(
            (request for request in self.active if not request.in_context),
            key=lambda request: request.in_flight is not None,
        )
        produced: list[tuple[LlmRequest, Tensor, int]] = []
        if context or generation:
            in_flight = {id(request): request.in_flight for request in generation if request.in_flight is not None}
            batch = types.SimpleNamespace(context_requests=context, generation_requests=generation)
            for request in generation:
                if request.in_flight is None:
                    request.py_batch_idx = None
            outputs = self._forward(batch, in_flight or None)
            logits = outputs.get("logits", torch.zeros(len(context) + len(generation), 40))
            if BEHAVIOUR.shift_rows:
                logits = logits[: len(context) + len(generation)].roll(1, dims=0)
            row = 0
            for request in context:
                last = request.is_last_context_chunk
                request.context_current_position += request.context_chunk_size
                if last:
                    produced.append((request, logits[row], len(request.tokens)))
                row += 1
            for request in generation:
                produced.append((request, logits[row], len(request.tokens) + (request.in_flight is not None)))
                row += 1
        if not BEHAVIOUR.overlap:
            self._finish_step(produced)
            return
        self._finish_step(self._pending)
        self._pending = []
        for request, row_logits, position in produced:
            if request.finish_reason is not None:
                self.extra_rows += 1
            elif position == len(request.tokens):  # not a request that was paused meanwhile
                request.in_flight = _sample(row_logits, request)
                self._pending.append((request, row_logits, position))

    def _forward(self, batch: Any, in_flight: Any) -> dict[str, Tensor]:
        if BEHAVIOUR.warm_up_again:
            made_up = [LlmRequest(None, [1, 2], 1, None, torch.Generator()) for _ in range(2)]
            self.model_engine.is_warmup = True
            self.model_engine.forward(types.SimpleNamespace(context_requests=[], generation_requests=made_up[:1]), None)
            self.model_engine.is_warmup = False
            made_up[1].is_cuda_graph_dummy = True
            batch.generation_requests = [*batch.generation_requests, made_up[1]]
        if isinstance(self.model_engine, AugustModelEngine):
            return self.model_engine.forward(batch=batch, resource_manager=None, new_tensors_device=in_flight)
        return self.model_engine.forward(batch, None, in_flight)

    def _finish_step(self, produced: list[tuple[LlmRequest, Tensor, int]]) -> None:
        for request, logits, position in produced:
            if request.finish_reason is not None or request.in_context or position != len(request.tokens):
                continue
            token = request.in_flight if BEHAVIOUR.overlap else _sample(logits, request)
            assert token is not None
            request.in_flight = None
            request.tokens.append(token)
            request.logits.append(logits)
            request.logprobs.append(_logprob(logits, token, request.parameters))
            stop = token in (request.parameters.stop_token_ids or []) and not request.parameters.ignore_eos
            if stop or len(request.response) >= request.parameters.max_tokens:
                self.finish(request, "stop" if stop else "length")

    def cancel(self, request: LlmRequest) -> None:
        """A request that has begun is answered as it is; one that waits is dropped without an answer."""
        if any(other is request for other in self.waiting):
            self.waiting = [other for other in self.waiting if other is not request]
        elif request.finish_reason is None:
            self.finish(request, "cancelled")

    def finish(self, request: LlmRequest, reason: str) -> None:
        request.finish_reason = reason
        self.active = [other for other in self.active if other is not request]
        request.done.set()

    def _pause_one(self) -> None:
        """The token in flight is discarded, and drawn again after the request was prefilled again."""
        running = [request for request in self.active if not request.in_context]
        if running and float(torch.rand(1, generator=self._random)) < BEHAVIOUR.pause:
            request = running[int(torch.randint(len(running), (1,), generator=self._random))]
            request.context_current_position, request.context_length = 0, len(request.tokens)
            request.in_flight = request.py_batch_idx = None
            self._pending = [entry for entry in self._pending if entry[0] is not request]
            self.paused += 1


def _sample(logits: Tensor, request: LlmRequest) -> int:
    if request.parameters.temperature in (None, 0):
        return int(logits.argmax())
    probs = (logits.double() / request.parameters.temperature).softmax(dim=-1)
    return int(torch.multinomial(probs, 1, generator=request.generator))


def _logprob(logits: Tensor, token: int, parameters: Any) -> Any:
    """Of temperature 1, as the real sampler gives it, unless asked for those after temperature."""
    if getattr(parameters, "logprobs_mode", "raw") == "processed":
        logits = logits.double() / parameters.temperature
    logs = logits.double().log_softmax(dim=-1)
    if getattr(parameters, "logprobs_simple_format", False):
        return float(logs[token])
    if parameters.logprobs is None:
        return None
    top = int(logs.argmax())
    entries = {top: types.SimpleNamespace(logprob=float(logs[top]), rank=1)}
    if hasattr(parameters, "logprobs_simple_format"):  # the older generation leaves the sampled token out
        entries[token] = types.SimpleNamespace(logprob=float(logs[token]), rank=None)
    return entries
