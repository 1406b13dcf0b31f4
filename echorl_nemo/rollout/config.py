"""How rollouts are generated."""

from dataclasses import dataclass, field
from typing import Any

from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import check_fields, number, word

ENGINES = ("megatron", "trtllm", "vllm")


@dataclass(kw_only=True)
class TrtllmConfig:
    """TensorRT-LLM's engine, where `rollout.engine` is trtllm (docs/tensorrt_llm.md)."""

    replicas: int = number(1, "[1, 4096]")
    """Engines, each with the whole model; rollouts are spread over them."""

    tensor_parallel: int = number(1, "[1, 1024]")
    """GPUs of each engine, all on one node."""

    colocated: bool = True
    """Whether the engines use the trainer's GPUs and give their memory back for training. A training run needs
    true: weights travel by handles of shared GPUs' memory."""

    gpu_memory_fraction: float = number(0.6, "(0, 1)")
    """Share of a GPU's free memory for the KV cache."""

    max_num_tokens: int = number(8192, "[1, 10000000]")
    """Tokens of one engine step; longer prompts are prefilled in chunks."""

    refit_bucket_mb: int = number(1024, "[1, 1000000]")
    """MiB of weights that travel at a time; so much more memory is needed meanwhile."""

    timeout_minutes: float = number(25.0, "(0, 100000]")
    """How long the engine may take for one call: to start, for all rollouts of a step, for a part of the weights. Then
    it counts as hanging, and is started again. Below `trainer.timeout_minutes`, which is how long other ranks wait."""

    max_waiting_tokens: int = number(1 << 26, "[1, 1000000000000]")
    """Tokens whose entropies may wait in a worker to be collected, 24 bytes each; more is an error."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of AsyncLLM, which come last. Those under which entropies would be wrong are refused."""

    def __post_init__(self) -> None:
        check_fields(self, "rollout.trtllm", error=UserError)


@dataclass(kw_only=True)
class VllmConfig:
    """vLLM's engine in NeMo-RL, where `rollout.engine` is vllm."""

    tensor_parallel: int | None = number(None, "[1, 1024]", "null is parallel.tensor")
    """GPUs of each engine. Null: as many as share a layer in training, `parallel.tensor`."""

    def __post_init__(self) -> None:
        check_fields(self, "rollout.vllm", error=UserError)


@dataclass(kw_only=True)
class RolloutConfig:
    """How rollouts are generated."""

    engine: str = word("megatron", ENGINES)
    """Who generates: `megatron`, the policy itself with the trainer's own inference; `trtllm`, TensorRT-LLM; `vllm`, in
    NeMo-RL alone."""

    group_size: int = number(8, "[1, 65536]")
    """G, rollouts of each prompt."""

    max_new_tokens: int = number(1024, "[1, 10000000]")
    """Longest response, in tokens; a response that reaches it without a stop token is truncated."""

    temperature: float = number(1.0, "(0, 100]", "at 0 the rollouts of a group would be alike")
    """Divides the logits, in sampling, scoring and training alike."""

    top_p: float = number(1.0, "(0, 1]", "1 is off")
    """Sample from the smallest set of tokens that holds this probability; 1 is off."""

    top_k: int = number(0, "[0, 10000000]", "0 is off")
    """Sample from the k likeliest tokens; 0 is off."""

    batch_size: int = number(64, "[1, 1000000]")
    """Rollouts that one model replica generates at a time. With `megatron` the KV cache is allocated for all of them at
    full length: 2 x layers x key-value heads x head width x 2 bytes of bf16 for each token, over the tensor-parallel
    ranks."""

    check_share: float = number(0.01, "[0, 1]")
    """Share of the rollouts on which engine and policy are compared where that is not had for nothing: the policy
    scores them although it need not, and TensorRT-LLM returns its largest log-probs. 0 is off."""

    trtllm: TrtllmConfig = field(default_factory=TrtllmConfig)
    """Settings of TensorRT-LLM."""

    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Settings of vLLM."""

    def __post_init__(self) -> None:
        check_fields(self, "rollout", error=UserError)
