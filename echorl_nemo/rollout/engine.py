"""What every rollout engine offers, and what it asks of the trainer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.errors import UserError
from echorl_nemo.rollout.batch import RolloutBatch

ENGINES = ("megatron", "trtllm", "vllm")


@dataclass(kw_only=True)
class TrtllmConfig:
    """TensorRT-LLM's engine, where `rollout.engine` is trtllm (docs/tensorrt_llm.md)."""

    replicas: int = 1
    """Engines, each with the whole model; rollouts are spread over them."""

    tensor_parallel: int = 1
    """GPUs of each engine, all on one node."""

    colocated: bool = True
    """Whether the engines use the trainer's GPUs and give their memory back for training. A training run needs
    true: weights travel by handles of shared GPUs' memory."""

    gpu_memory_fraction: float = 0.6
    """Share of a GPU's free memory for the KV cache."""

    max_num_tokens: int = 8192
    """Tokens of one engine step; longer prompts are prefilled in chunks."""

    refit_bucket_mb: int = 1024
    """MiB of weights that travel at a time; so much more memory is needed meanwhile."""

    timeout_minutes: float = 25.0
    """How long the engine may take for one call: to start, for all rollouts of a step, for a part of the weights. Then
    it counts as hanging, and is started again. Below `trainer.timeout_minutes`, which is how long other ranks wait."""

    max_waiting_tokens: int = 1 << 26
    """Tokens whose entropies may wait in a worker to be collected, 24 bytes each; more is an error."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of AsyncLLM, which come last. Those under which entropies would be wrong are refused."""

    def __post_init__(self) -> None:
        for name in ("replicas", "tensor_parallel", "max_num_tokens", "refit_bucket_mb", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"rollout.trtllm.{name}={getattr(self, name)} must be at least 1")
        if self.timeout_minutes <= 0:
            raise UserError(f"rollout.trtllm.timeout_minutes={self.timeout_minutes} must be above 0")
        if not 0 < self.gpu_memory_fraction < 1:
            raise UserError(f"rollout.trtllm.gpu_memory_fraction={self.gpu_memory_fraction} must lie in (0, 1)")


@dataclass(kw_only=True)
class RolloutConfig:
    """How rollouts are generated."""

    engine: str = "megatron"
    """Who generates: `megatron`, the policy itself with the trainer's own inference; `trtllm`, TensorRT-LLM; `vllm`, in
    NeMo-RL alone."""

    group_size: int = 8
    """G, rollouts of each prompt."""

    max_new_tokens: int = 1024
    """Longest response, in tokens; a response that reaches it without a stop token is truncated."""

    temperature: float = 1.0
    """Divides the logits, in sampling, scoring and training alike."""

    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this probability; 1 is off."""

    top_k: int = 0
    """Sample from the k likeliest tokens; 0 is off."""

    batch_size: int = 64
    """Rollouts that one model replica generates at a time. With `megatron` the KV cache is allocated for all of them at
    full length: 2 x layers x key-value heads x head width x 2 bytes of bf16 for each token, over the tensor-parallel
    ranks."""

    check_share: float = 0.01
    """Share of the rollouts on which engine and policy are compared where that is not had for nothing: the policy
    scores them although it need not, and TensorRT-LLM returns its largest log-probs. 0 is off."""

    trtllm: TrtllmConfig = field(default_factory=TrtllmConfig)
    """Settings of TensorRT-LLM."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"rollout.engine={self.engine!r} is not known; use one of {', '.join(ENGINES)}")
        if not 0 <= self.check_share <= 1:
            raise UserError(f"rollout.check_share={self.check_share} must lie in [0, 1]")
        if self.temperature <= 0:
            raise UserError(
                f"rollout.temperature={self.temperature} must be above 0: the rollouts of a group would be alike"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"rollout.top_p={self.top_p} must lie in (0, 1]; 1 is off")
        if self.top_k < 0:
            raise UserError(f"rollout.top_k={self.top_k} is negative; 0 is off")
        for name in ("group_size", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"rollout.{name}={getattr(self, name)} must be at least 1")


class EngineError(RuntimeError):
    """An engine that died, or gave no answer in time. Raised on every rank alike; a new one may do."""

    def __init__(self, what: str, log: str = "") -> None:
        """``log``: the end of what the engine printed."""
        super().__init__(what, log)
        self.log = log

    def __str__(self) -> str:
        return str(self.args[0])


class WeightSource(Protocol):
    """A policy whose weights an engine takes over. Every rank calls every method."""

    @property
    def device_key(self) -> str:
        """This rank's GPU by a name that other processes on it share; `cpu` without one."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole and under its Hugging Face name, on this rank's device, one after the other."""
        ...


class Ranks(Protocol):
    """The trainer's ranks, as an engine that one of them talks to needs them."""

    @property
    def main(self) -> bool:
        """True on one rank."""
        ...

    def share_objects(self, mine: Sequence[Any]) -> list[Any]:
        """The concatenation, in rank order, of what each rank gives."""
        ...

    def barrier(self) -> None:
        """Waits for every rank."""
        ...


class RolloutEngine(Protocol):
    """Generates rollouts with the policy's current weights."""

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, temperature: float | None = None
    ) -> RolloutBatch:
        """``group_size`` rollouts of each prompt, those of one prompt in consecutive rows.

        ``temperature`` overrides the configured one; 0 takes the likeliest token.

        The same ``seed`` gives the same rollouts whatever the parallel layout and batch size. Every rank gets the
        whole batch; all fields up to ``responses`` are filled in, and ``rollout_logprobs`` and ``entropies`` where the
        engine knows them.
        """
        ...

    def update_weights(self, policy: WeightSource) -> None:
        """Takes over the weights of ``policy`` after an update; nothing to do where they are shared."""
        ...

    def sleep(self) -> None:
        """Makes room for training, where the GPUs are shared."""
        ...

    def wake(self) -> None:
        """Makes ready to generate."""
        ...

    def close(self) -> None:
        """Ends what the engine started."""
        ...
