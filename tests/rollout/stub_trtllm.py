"""A stub of TensorRT-LLM, which cannot be installed here: AsyncLLM over a PyExecutor that behaves like the real one
where the probe could go wrong, with a transformers model behind it.

Like the real one: chunked prefill with a row of logits for every context request; generation rows after them; rows of
padding for CUDA graphs; the overlap scheduler, which launches a step before the tokens of the one before are known, and
so one step too many for a finished request; requests that are paused and prefilled again, their token in flight
discarded; aborts; client ids; logits before temperature, in bf16 if asked, -inf for masked entries; an extension class
mixed into the worker; weights that are reloaded in parts. What it has not: more than one worker, CUDA, Ray's processes.

`install()` puts it in place of tensorrt_llm and ray.
"""

import asyncio
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import transformers
from torch import Tensor


@dataclass
class OldSamplingParams:
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 32
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    seed: int | None = None
    logprobs: int | None = None
    return_generation_logits: bool = False
    ignore_eos: bool = False


@dataclass
class SamplingParams(OldSamplingParams):
    """Of the newer generation."""

    logprobs_simple_format: bool = False


@dataclass
class SleepConfig:
    restore_modes: dict[Any, str] = field(default_factory=dict)


class ExecutorMemoryType(Enum):
    MODEL_WEIGHTS_MAIN = "model_weights_main"
    KV_CACHE = "kv_cache"
    PRIVATE = "_private"


@dataclass
class Behaviour:
    """What the stub does besides generating."""

    chunk_tokens: int = 5
    """Prompt tokens of a request that one step prefills."""
    max_active: int = 64
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


BEHAVIOUR = Behaviour()
REMOVED_PLACES: list[Any] = []


class RayError(Exception):
    """What Ray raises for an actor that died."""


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
        _, unexpected = model.load_state_dict(weights, strict=not allow_partial_loading)
        assert not unexpected, unexpected


class ModelEngine:
    def __init__(self, path: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
        self.model_loader = ModelLoader()
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


class PyExecutor:
    """Steps through the requests; see the module's text for what it imitates."""

    def __init__(self, path: str) -> None:
        self.model_engine = ModelEngine(path)
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
            outputs = self.model_engine.forward(batch, None, in_flight or None)
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

    def finish(self, request: LlmRequest, reason: str) -> None:
        request.finish_reason = reason
        self.active = [other for other in self.active if other is not request]
        self.waiting = [other for other in self.waiting if other is not request]
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
    """Of temperature 1, as the real sampler gives it."""
    logs = logits.double().log_softmax(dim=-1)
    if getattr(parameters, "logprobs_simple_format", False):
        return float(logs[token])
    if parameters.logprobs is None:
        return None
    top = int(logs.argmax())
    entries = {top: types.SimpleNamespace(logprob=float(logs[top]), rank=1)}
    if isinstance(parameters, SamplingParams):  # the older generation leaves the sampled token out
        entries[token] = types.SimpleNamespace(logprob=float(logs[token]), rank=None)
    return entries


class RayGPUWorker:
    """What an extension class is mixed into."""

    def __init__(self, path: str) -> None:
        self.engine = PyExecutor(path)
        self.device_id = 0
        self.asleep: set[str] = set()

    def sleep(self, tags: list[str]) -> None:
        self.asleep |= set(tags)
        self.engine.stale_prefixes = True

    def wakeup(self, tags: list[str]) -> None:
        self.asleep -= set(tags)


class RequestOutput:
    """Awaitable; then `outputs[0]`."""

    def __init__(self, llm: "AsyncLLM", request: LlmRequest, request_id: int) -> None:
        self._llm, self._request, self.request_id = llm, request, request_id
        self.outputs: list[Any] = []

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> "RequestOutput":
        await self._request.done.wait()
        if self._llm.failure is not None:
            raise self._llm.failure
        request = self._request
        self.outputs = [
            types.SimpleNamespace(
                token_ids=request.response,
                logprobs=[value for value in request.logprobs if value is not None],
                finish_reason=request.finish_reason,
                generation_logits=torch.stack(request.logits) if request.parameters.return_generation_logits else None,
            )
        ]
        return self

    def abort(self) -> None:
        if self._request.finish_reason is None:
            self._llm.worker.engine.finish(self._request, "cancelled")


ARGUMENTS = {
    "model", "backend", "tensor_parallel_size", "max_seq_len", "max_input_len", "max_batch_size", "max_num_tokens",
    "kv_cache_config", "ray_worker_extension_cls", "placement_groups", "placement_bundle_indices",
    "per_worker_gpu_share", "dtype", "enable_chunked_prefill",
}  # fmt: skip
NEW_ARGUMENTS = {"sleep_config"}
OLD_ARGUMENTS = {"enable_sleep", "allreduce_strategy", "sampler_type"}


class AsyncLLM:
    """One worker; every created one is kept in `created`."""

    created: list["AsyncLLM"] = []  # noqa: RUF012  a test looks at them
    accepted = ARGUMENTS | NEW_ARGUMENTS

    def __init__(self, **kwargs: Any) -> None:
        if unknown := kwargs.keys() - self.accepted:
            raise ValueError(f"AsyncLLM got unknown arguments {sorted(unknown)}")
        self.arguments = kwargs
        module, _, name = kwargs["ray_worker_extension_cls"].rpartition(".")
        extension = getattr(importlib.import_module(module), name)
        if clash := {attribute for attribute in vars(extension) if not attribute.startswith("__")} & set(
            dir(RayGPUWorker)
        ):
            raise ValueError(f"extension class has names of the worker: {clash}")
        self.worker: Any = type("Worker", (RayGPUWorker, extension), {})(kwargs["model"])
        self._next_id = 100
        self._task: asyncio.Task[None] | None = None
        self.ready = self.closed = False
        self.failure: RayError | None = None
        self.steps = 0
        AsyncLLM.created.append(self)

    async def setup_async(self) -> None:
        self.ready = True

    def generate_async(self, inputs: dict[str, Any], sampling_params: Any) -> RequestOutput:
        assert self.ready and not self.worker.asleep, "not ready, or asleep"
        prompt = list(inputs["prompt_token_ids"])
        assert len(prompt) + sampling_params.max_tokens <= self.arguments["max_seq_len"] + 8
        self._next_id += 1
        request = LlmRequest(
            py_client_id=None if BEHAVIOUR.no_client_ids else self._next_id,
            tokens=prompt,
            prompt_length=len(prompt),
            parameters=sampling_params,
            generator=torch.Generator().manual_seed(sampling_params.seed or 0),
            context_length=len(prompt),
        )
        self.worker.engine.waiting.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._steps())
        return RequestOutput(self, request, self._next_id)

    async def _steps(self) -> None:
        engine = self.worker.engine
        faulty = AsyncLLM.created.index(self) < BEHAVIOUR.faulty_engines
        while engine.waiting or engine.active or engine._pending:
            if faulty and self.steps == BEHAVIOUR.dies_after:
                self.failure = RayError("the actor died: exit code 139")
                for request in (*engine.waiting, *engine.active):
                    request.done.set()
                return
            if faulty and self.steps == BEHAVIOUR.hangs_after:
                await asyncio.Event().wait()
            engine.step()
            self.steps += 1
            await asyncio.sleep(0)

    async def collective_rpc(
        self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
        unique_reply_rank: int | None = None,
    ) -> list[Any]:  # fmt: skip
        if self.failure is not None:
            raise self.failure
        if self._task is not None and method.startswith("echorl_refit"):
            await asyncio.wait([self._task])  # as a control action waits for the engine to be idle
        return [getattr(self.worker, method)(*args, **(kwargs or {}))]

    async def release(self, tags: list[str]) -> None:
        await self.collective_rpc("sleep", args=(tags,))

    async def resume(self, tags: list[str]) -> None:
        await self.collective_rpc("wakeup", args=(tags,))

    def shutdown(self) -> None:
        self.closed = True


class OldAsyncLLM(AsyncLLM):
    accepted = ARGUMENTS | OLD_ARGUMENTS


@contextmanager
def install(behaviour: Behaviour | None = None, *, old: bool = False) -> Iterator[type[AsyncLLM]]:
    """Import `tensorrt_llm` and `ray` as the stub, of the newer or the ``old`` generation, behaving as asked."""
    global BEHAVIOUR
    BEHAVIOUR = behaviour or Behaviour()
    AsyncLLM.created.clear()
    REMOVED_PLACES.clear()
    modules = {name: types.ModuleType(name) for name in (
        "tensorrt_llm", "tensorrt_llm.llmapi", "tensorrt_llm.llmapi.llm_args", "tensorrt_llm._torch",
        "tensorrt_llm._torch.virtual_memory", "ray", "ray.exceptions", "ray.util", "ray.util.placement_group",
    )}  # fmt: skip
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="stub_trtllm.py")
    root: Any = modules["tensorrt_llm"]
    root.__version__ = "1.2.0" if old else "1.3.0rc21"
    root.AsyncLLM, root.SamplingParams = (OldAsyncLLM, OldSamplingParams) if old else (AsyncLLM, SamplingParams)
    args: Any = modules["tensorrt_llm.llmapi.llm_args"]
    modules["tensorrt_llm.llmapi"].__dict__["llm_args"] = args
    if old:
        modules["tensorrt_llm._torch.virtual_memory"].__dict__["ExecutorMemoryType"] = ExecutorMemoryType
    else:
        args.SleepConfig, args.ExecutorMemoryType = SleepConfig, ExecutorMemoryType
    ray: Any = modules["ray"]
    ray.is_initialized, ray.init, ray.get = (lambda: True), (lambda: None), (lambda value, timeout=None: value)
    ray.cluster_resources = lambda: {"GPU": 8.0}
    modules["ray.exceptions"].__dict__["RayError"] = RayError
    modules["ray.util.placement_group"].__dict__["remove_placement_group"] = REMOVED_PLACES.append
    modules["ray.util.placement_group"].__dict__["placement_group"] = lambda bundles, strategy: types.SimpleNamespace(
        ready=lambda: True, bundles=bundles, strategy=strategy
    )
    kept = {name: sys.modules[name] for name in modules if name in sys.modules}  # another test's stand-in for ray
    sys.modules.update(modules)
    try:
        yield root.AsyncLLM
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(kept)
