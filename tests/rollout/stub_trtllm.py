"""A stub of TensorRT-LLM, which cannot be installed here: AsyncLLM over the executor of `stub_executor`, which behaves
like the real one where the probe could go wrong. An extension class is mixed into the worker. What it has not: more
than one worker, CUDA, Ray's processes.

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

from tests.rollout import stub_executor
from tests.rollout.stub_executor import AugustModelEngine, Behaviour, LlmRequest, ModelEngine, PyExecutor


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
class AugustSamplingParams(SamplingParams):
    """Of August 2026."""

    logprobs_mode: str = "raw"


@dataclass
class SleepConfig:
    restore_modes: dict[Any, str] = field(default_factory=dict)


class ExecutorMemoryType(Enum):
    MODEL_WEIGHTS_MAIN = "model_weights_main"
    KV_CACHE = "kv_cache"
    PRIVATE = "_private"


REMOVED_PLACES: list[Any] = []


class RayError(Exception):
    """What Ray raises for an actor that died."""


class WorkerExtension:
    """TensorRT-LLM's own, of August 2026."""

    engine: Any

    def finalize_weight_update(self) -> None:
        self.engine.model_engine.model_loader.finalize_update_weights()
        self.engine.model_engine.model_loader.calls.append("upstream")


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
        self._llm.worker.engine.cancel(self._request)


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
    starting = most_starting = 0
    """Engines that load now, and the most that did at a time."""
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
        AsyncLLM.starting += 1
        AsyncLLM.most_starting = max(AsyncLLM.most_starting, AsyncLLM.starting)
        await asyncio.sleep(0)  # loading
        AsyncLLM.starting -= 1
        self.ready = True

    def generate_async(self, inputs: dict[str, Any], sampling_params: Any) -> RequestOutput:
        assert self.ready and not self.worker.asleep, "not ready, or asleep"
        prompt = list(inputs["prompt_token_ids"])
        assert len(prompt) + sampling_params.max_tokens <= self.arguments["max_seq_len"] + 8
        self._next_id += 1
        request = LlmRequest(
            py_client_id=None if stub_executor.BEHAVIOUR.no_client_ids else self._next_id,
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
        faulty = AsyncLLM.created.index(self) < stub_executor.BEHAVIOUR.faulty_engines
        while engine.waiting or engine.active or engine._pending:
            if faulty and self.steps == stub_executor.BEHAVIOUR.dies_after:
                self.failure = RayError("the actor died: exit code 139")
                for request in (*engine.waiting, *engine.active):
                    request.done.set()
                return
            if faulty and self.steps == stub_executor.BEHAVIOUR.hangs_after:
                await asyncio.Event().wait()
            engine.step()
            self.steps += 1
            await asyncio.sleep(stub_executor.BEHAVIOUR.step_seconds)

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
def install(behaviour: Behaviour | None = None, *, old: bool = False, august: bool = False) -> Iterator[type[AsyncLLM]]:
    """Import `tensorrt_llm` and `ray` as the stub, of March 2026, of the ``old`` generation before or that of
    ``august``, behaving as asked."""
    PyExecutor.model_engine_class = AugustModelEngine if august else ModelEngine
    stub_executor.BEHAVIOUR = behaviour or Behaviour()
    AsyncLLM.created.clear()
    AsyncLLM.starting = AsyncLLM.most_starting = 0
    REMOVED_PLACES.clear()
    modules = {name: types.ModuleType(name) for name in (
        "tensorrt_llm", "tensorrt_llm.llmapi", "tensorrt_llm.llmapi.llm_args", "tensorrt_llm._torch",
        "tensorrt_llm._torch.virtual_memory", "tensorrt_llm.llmapi.rlhf_utils", "ray", "ray.exceptions", "ray.util",
        "ray.util.placement_group",
    )}  # fmt: skip
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="stub_trtllm.py")
    root: Any = modules["tensorrt_llm"]
    root.__version__ = "1.2.0" if old else "1.3.0" if august else "1.3.0rc21"
    root.AsyncLLM, root.SamplingParams = (OldAsyncLLM, OldSamplingParams) if old else (AsyncLLM, SamplingParams)
    if august:
        root.SamplingParams = AugustSamplingParams
        modules["tensorrt_llm.llmapi.rlhf_utils"].__dict__["WorkerExtension"] = WorkerExtension
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
