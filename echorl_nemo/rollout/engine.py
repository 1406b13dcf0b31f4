"""What every rollout engine offers, and what it asks of the trainer."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.rollout.batch import RolloutBatch


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
