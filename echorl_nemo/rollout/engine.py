"""What every rollout engine offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.errors import UserError
from echorl_nemo.rollout.batch import RolloutBatch


@dataclass(kw_only=True)
class RolloutConfig:
    """How rollouts are generated."""

    engine: str = "megatron"
    """Who generates: `megatron`, the policy itself with Megatron-Core's inference context."""

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
    """Rollouts that one model replica generates at a time. The KV cache is allocated for all of them at full length:
    2 x layers x key-value heads x head width x 2 bytes of bf16 for each token, over the tensor-parallel ranks."""

    def __post_init__(self) -> None:
        if self.engine != "megatron":
            raise UserError(f"rollout.engine={self.engine!r} is not known; use megatron")
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


class RolloutEngine(Protocol):
    """Generates rollouts with the policy's current weights."""

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, temperature: float | None = None
    ) -> RolloutBatch:
        """``group_size`` rollouts of each prompt, those of one prompt in consecutive rows.

        ``temperature`` overrides the configured one; 0 takes the likeliest token.

        The same ``seed`` gives the same rollouts whatever the parallel layout and batch size. Every rank gets the
        whole batch; all fields up to ``rollout_logprobs`` are filled in.
        """
        ...

    def update_weights(self, policy: object) -> None:
        """Takes over the weights of ``policy`` after an update; nothing to do where they are shared."""
        ...
