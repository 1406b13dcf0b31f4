"""The seams between TensorRT-LLM's versions: all that differs from one to another is detected here.

`contract.json` beside this file lists every name that is relied upon, with its source.
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
    "pipeline_parallel_size": "with pipeline parallelism the logits are on one stage alone",
    "enable_attention_dp": "with attention data parallelism each rank has logits of other requests",
    "context_parallel_size": "with context parallelism positions count over ranks",
    "max_beam_width": "beams share a request",
    "orchestrator_type": "the probe is mixed into Ray workers",
    "ray_worker_extension_cls": "the probe is there",
    "guided_decoding_config": "guided decoding samples from other logits than the model's",
}
"""Arguments of AsyncLLM under which entropies would be wrong or missing, with the reason."""


@dataclass(frozen=True)
class TrtllmApi:
    """TensorRT-LLM as it is installed."""

    version: str
    async_llm: Callable[..., Any]
    sampling_params: Callable[..., Any]
    sleep_config: Callable[..., Any] | None
    """Since March 2026; before, AsyncLLM has `enable_sleep`."""
    memory_tags: tuple[str, ...]
    """What `release` and `resume` take: everything that a worker holds."""
    failures: tuple[type[BaseException], ...]
    """What is raised where the engine or a worker of its has died, or gives no answer."""
    simple_logprobs: bool
    """Whether the sampled token's log-prob comes as a number; before, as one of the top-K, or not."""


def load_api() -> TrtllmApi:
    """Import TensorRT-LLM. Raises UserError where it is not installed."""
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
    return TrtllmApi(
        version=str(tensorrt_llm.__version__),
        async_llm=tensorrt_llm.AsyncLLM,
        sampling_params=tensorrt_llm.SamplingParams,
        sleep_config=sleep_config,
        # a name that begins with an underscore is TensorRT-LLM's own
        memory_tags=tuple(tag.value for tag in memory_type if not tag.value.startswith("_")),
        failures=(RuntimeError, OSError, RayError),  # TensorRT-LLM's RequestError is the first
        simple_logprobs="logprobs_simple_format" in _parameters(tensorrt_llm.SamplingParams),
    )


def refused_problems(extra: Mapping[str, Any], field: str) -> list[str]:
    """What of a user's own AsyncLLM arguments cannot be."""
    return [
        f"{field}.{name}={extra[name]!r}: {reason}; leave it out"
        for name, reason in REFUSED.items()
        if not _is_neutral(extra.get(name))
    ]


def _is_neutral(value: Any) -> bool:
    """Absent, off, or a size of one."""
    return value is None or value is False or (value == 1 and value is not True)


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
    """The arguments of AsyncLLM; ``extra`` comes last."""
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
        arguments["sleep_config"] = api.sleep_config()
    elif colocated:
        # the sampler and all-reduce of that time that could be paused
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
) -> dict[str, Any]:
    """The arguments of SamplingParams for one rollout. ``top_logprob``: ask for the likeliest token's log-prob too."""
    arguments: dict[str, Any] = {
        "n": 1,
        "temperature": temperature,
        # with all of these unset TensorRT-LLM is greedy
        "top_p": top_p,
        "top_k": 1 if temperature == 0 else top_k,
        "max_tokens": max_tokens,
        "stop_token_ids": list(stop_ids),
        "include_stop_str_in_output": True,
        "detokenize": False,
        "seed": seed,
    }
    if api.simple_logprobs and not top_logprob:
        return {**arguments, "logprobs": 0, "logprobs_simple_format": True}
    return {**arguments, "logprobs": 1}


def _parameters(cls: Callable[..., Any]) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {spec.name for spec in dataclasses.fields(cls)}
    return set(inspect.signature(cls).parameters)
