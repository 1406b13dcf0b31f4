"""The interface of TensorRT-LLM, with the differences between its versions.

`contract.json` beside this file lists every name that is used, with its source.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from echorl_nemo.errors import UserError

REFUSED: dict[str, str] = {
    "speculative_config": "with speculative decoding a step's logits are not those of one token each",
    "pipeline_parallel_size": "with pipeline parallelism only one stage has the logits",
    "enable_attention_dp": "with attention data parallelism each rank has logits of different requests",
    "context_parallel_size": "with context parallelism positions count over ranks",
    "max_beam_width": "several beams share a request",
    "orchestrator_type": "the probe needs Ray workers",
    "ray_worker_extension_cls": "the probe is this class",
    "guided_decoding_config": "guided decoding changes the logits before sampling",
    "torch_compile_config": "a compiled model may lose the weights of a refit, without a word",
    "enable_fast_sampler": "it samples inside forward and divides the logits in place",
}
"""Arguments of AsyncLLM under which entropies would be wrong or missing, with the reason."""


@dataclass(frozen=True)
class TrtllmApi:
    """The classes and properties of the installed TensorRT-LLM."""

    version: str
    async_llm: Callable[..., Any]
    sampling_params: Callable[..., Any]
    sleep_config: Callable[..., Any] | None
    """The class SleepConfig, which exists since March 2026; None before, when AsyncLLM has `enable_sleep`."""
    memory_tags: tuple[str, ...]
    """Names of all kinds of a worker's memory, as `release` and `resume` take them."""
    failures: tuple[type[BaseException], ...]
    """Exceptions that are raised if the engine or one of its workers has died, or does not answer."""
    simple_logprobs: bool
    """Whether the sampled token's log-prob is returned as a number. In older versions it is one of the top-K, or
    missing."""
    processed_logprobs: bool
    """Whether log-probs after temperature can be asked for (`logprobs_mode`, of 2026); otherwise they are those of
    temperature 1."""
    restore_modes: Mapping[Any, str]
    """Where the memory's content is kept while its GPU memory is released, for `sleep_config`: weights in the host's
    memory, since an evaluation may wake the engine without a refit; the cache nowhere."""


def load_api() -> TrtllmApi:
    """Import TensorRT-LLM. Raises UserError if it is not installed."""
    try:
        import tensorrt_llm
        from ray.exceptions import RayError
        from tensorrt_llm.llmapi import llm_args
    except ImportError as error:
        raise UserError(
            f"rollout.engine=trtllm: TensorRT-LLM cannot be imported ({error}); run in a container that carries it, "
            "see docs/tensorrt_llm.md, or use rollout.engine=megatron"
        ) from error
    sleep_config = getattr(llm_args, "SleepConfig", None)
    memory_type: Any = getattr(llm_args, "ExecutorMemoryType", None)
    if memory_type is None:
        memory_type = importlib.import_module("tensorrt_llm._torch.virtual_memory").ExecutorMemoryType
    modes = {"MODEL_WEIGHTS_MAIN": "PINNED", "KV_CACHE": "NONE"}
    parameters = _parameters(tensorrt_llm.SamplingParams)
    return TrtllmApi(
        version=str(tensorrt_llm.__version__),
        async_llm=tensorrt_llm.AsyncLLM,
        sampling_params=tensorrt_llm.SamplingParams,
        sleep_config=sleep_config,
        # names that begin with an underscore are internal to TensorRT-LLM
        memory_tags=tuple(tag.value for tag in memory_type if not tag.value.startswith("_")),
        failures=(RuntimeError, OSError, RayError),  # TensorRT-LLM's RequestError is the first
        simple_logprobs="logprobs_simple_format" in parameters,
        processed_logprobs="logprobs_mode" in parameters,
        restore_modes={memory_type[name]: mode for name, mode in modes.items() if name in memory_type.__members__},
    )


def llm_arguments(
    api: TrtllmApi,
    *,
    model: str,
    tensor_parallel: int,
    longest_prompt: int,
    max_new_tokens: int,
    max_batch_size: int,
    max_num_tokens: int,
    gpu_memory_fraction: float,
    colocated: bool,
    placement: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of AsyncLLM. ``extra`` overrides the others."""
    arguments: dict[str, Any] = {
        "model": model,
        "backend": "pytorch",
        "tensor_parallel_size": tensor_parallel,
        "max_seq_len": longest_prompt + max_new_tokens,
        "max_input_len": longest_prompt + max_new_tokens,  # 1024 by default, and a paused request is prefilled again
        "max_batch_size": max_batch_size,
        "max_num_tokens": max_num_tokens,
        "enable_chunked_prefill": True,  # a request that is prefilled again may have more than max_num_tokens
        "kv_cache_config": {"free_gpu_memory_fraction": gpu_memory_fraction},
        "ray_worker_extension_cls": "echorl_nemo.rollout.trtllm.worker_extension.EchoWorkerExtension",
        **placement,
    }
    if colocated and api.sleep_config is not None:
        arguments["sleep_config"] = api.sleep_config(restore_modes=dict(api.restore_modes))
    elif colocated:
        # the sampler and all-reduce of those versions that can be paused
        arguments |= {"enable_sleep": True, "allreduce_strategy": "NCCL", "sampler_type": "TRTLLMSampler"}
    return {**arguments, **extra}


def sampling_arguments(
    api: TrtllmApi,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int,
    stop_ids: tuple[int, ...],
    seed: int,
    top_logprob: bool,
    processed: bool,
) -> dict[str, Any]:
    """The arguments of SamplingParams for one rollout. ``top_logprob``: whether to return the likeliest token's
    log-prob too. ``processed``: whether log-probs are those after temperature."""
    arguments: dict[str, Any] = {
        "n": 1,
        "temperature": temperature,
        # TensorRT-LLM samples greedily if none of these is set
        "top_p": top_p,
        "top_k": 1 if temperature == 0 else top_k,
        "max_tokens": max_tokens,
        "stop_token_ids": list(stop_ids),
        "include_stop_str_in_output": True,
        "detokenize": False,
        "seed": seed,
        **({"logprobs_mode": "processed"} if processed else {}),
    }
    if api.simple_logprobs and not top_logprob:
        return {**arguments, "logprobs": 0, "logprobs_simple_format": True}
    return {**arguments, "logprobs": 1}


def _parameters(cls: Callable[..., Any]) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {spec.name for spec in dataclasses.fields(cls)}
    return set(inspect.signature(cls).parameters)
