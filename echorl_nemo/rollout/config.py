"""Configuration of the rollouts and of the engines that generate them."""

from dataclasses import dataclass, field
from typing import Any

from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import check_fields, choice, number

LONGEST_MINUTES = 100000
ENGINES = ("megatron", "trtllm", "vllm")


@dataclass(kw_only=True)
class TrtllmConfig:
    """Settings of TensorRT-LLM, for `rollout.engine=trtllm` (docs/tensorrt_llm.md)."""

    replicas: int = number(1, "[1, 4096]")
    """Number of engines, each with the whole model. The rollouts are distributed over them."""

    tensor_parallel: int = number(1, "[1, 1024]")
    """GPUs of each engine, all on one node."""

    colocated: bool = True
    """Whether the engines use the trainer's GPUs and free their memory for training. A training run needs true: weights
    are transferred through memory of a shared GPU."""

    gpu_memory_fraction: float = number(0.6, "(0, 1)")
    """Share of a GPU's free memory for the KV cache."""

    max_num_tokens: int = number(8192, "[1, 10000000]")
    """Tokens of one engine step; longer prompts are prefilled in chunks."""

    refit_bucket_mb: int = number(1024, "[1, 1000000]")
    """MiB of weights that are transferred at a time, which need that much more memory."""

    timeout_minutes: float = number(25.0, "(0, 100000]")
    """Time limit of one call of the engine: its start, all rollouts of a step, one part of the weights. After it the
    engine is restarted. It must be less than `trainer.timeout_minutes`, the time that other ranks wait."""

    request_minutes: float | None = number(None, "(0, 100000]", "null is off")
    """Time limit of one rollout, from when a step asks for it: then it ends with the tokens that it has, truncated, so
    that the longest rollout does not cost a step. It must be less than `timeout_minutes`. Null is off."""

    max_waiting_tokens: int = number(1 << 26, "[1, 1000000000000]")
    """Largest number of tokens whose entropies wait in a worker to be collected, 24 bytes each; more is an error."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of AsyncLLM, which override others. Those under which entropies would be wrong are refused."""

    def __post_init__(self) -> None:
        more = []
        limit, whole = self.request_minutes, self.timeout_minutes
        numbers = all(isinstance(value, (int, float)) for value in (limit, whole))
        if numbers and whole <= limit <= LONGEST_MINUTES:  # type: ignore[operator]  # both are numbers
            more.append(
                f"rollout.trtllm.request_minutes={limit:g}: the whole generation ends after "
                f"rollout.trtllm.timeout_minutes={whole:g}; use less, or raise that"
            )
        check_fields(self, "rollout.trtllm", more, error=UserError)


@dataclass(kw_only=True)
class VllmConfig:
    """Settings of vLLM in NeMo-RL, for `rollout.engine=vllm`."""

    tensor_parallel: int | None = number(None, "[1, 1024]", "null is parallel.tensor")
    """GPUs of each engine. Null: `parallel.tensor`, the number that share a layer in training."""

    gpu_memory_share: float = number(0.6, "(0, 1]")
    """Share of a GPU's whole memory that an engine takes for weights and KV cache, vLLM's gpu_memory_utilization."""

    def __post_init__(self) -> None:
        check_fields(self, "rollout.vllm", error=UserError)


@dataclass(kw_only=True)
class RolloutConfig:
    """Settings of generation."""

    engine: str = choice("megatron", ENGINES)
    """Rollout engine: `megatron`, the policy itself with Megatron-Core's inference; `trtllm`, TensorRT-LLM; `vllm`,
    only in NeMo-RL."""

    group_size: int = number(8, "[1, 65536]")
    """Number of rollouts of each prompt, G."""

    max_new_tokens: int = number(1024, "[1, 10000000]")
    """Longest response, in tokens; a response that reaches it without a stop token is truncated."""

    mean_new_tokens: int | None = number(None, "[1, 10000000]", "null is rollout.max_new_tokens")
    """Mean length of the responses that is expected, in tokens, for the plan's times and network volume. Null:
    `max_new_tokens`, which gives upper bounds. Memory is always planned for `max_new_tokens`."""

    temperature: float = number(1.0, "(0, 100]", "at 0 the rollouts of a group would be alike")
    """Divisor of the logits in sampling, scoring and training."""

    top_p: float = number(1.0, "(0, 1]", "1 is off")
    """Sample from the smallest set of tokens that holds this probability; 1 is off."""

    top_k: int = number(0, "[0, 10000000]", "0 is off")
    """Sample from the k likeliest tokens; 0 is off."""

    batch_size: int = number(64, "[1, 1000000]")
    """Rollouts that one model replica generates at a time. With `megatron` the KV cache is allocated for all of them at
    full length: for each token 2 x layers x key-value heads x head width x 2 bytes (bf16), split over the
    tensor-parallel ranks."""

    check_share: float = number(0.01, "[0, 1]")
    """Share of the rollouts on which engine and policy are compared, if the comparison takes extra work: the policy
    scores them although the scoring pass is skipped, and TensorRT-LLM also returns its largest log-probs. 0 is off."""

    trtllm: TrtllmConfig = field(default_factory=TrtllmConfig)
    """Settings of TensorRT-LLM."""

    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Settings of vLLM."""

    def __post_init__(self) -> None:
        more = []
        if isinstance(self.mean_new_tokens, int) and self.mean_new_tokens > self.max_new_tokens:
            more.append(
                f"rollout.mean_new_tokens={self.mean_new_tokens} is above "
                f"rollout.max_new_tokens={self.max_new_tokens}; use at most that"
            )
        check_fields(self, "rollout", more, error=UserError)
