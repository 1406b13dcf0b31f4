"""The protocol of rollout engines, and the protocols of what the trainer gives them."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.rollout.batch import RolloutBatch


class EngineError(RuntimeError):
    """A rollout engine has died, or did not answer in time. Raised on every rank alike; a restart may help."""

    def __init__(self, what: str, log: str = "") -> None:
        """``log``: the last lines that the engine printed."""
        super().__init__(what, log)
        self.log = log

    def __str__(self) -> str:
        return str(self.args[0])


class WeightSource(Protocol):
    """A policy whose weights a rollout engine loads. Every rank must call each method."""

    @property
    def device_key(self) -> str:
        """A name of this rank's GPU that is the same in every process; `cpu` without a GPU."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over all weights: Hugging Face name and whole tensor, on this rank's device."""
        ...


class Ranks(Protocol):
    """Communication between the trainer's ranks, for an engine that only the main rank controls."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main rank."""
        ...

    def all_gather_objects(self, mine: Sequence[Any]) -> list[Any]:
        """The objects of all ranks in one list, in rank order."""
        ...

    def exchange_rollouts(self, held: RolloutBatch | None, groups: Sequence[int]) -> RolloutBatch:
        """This rank's part of the rollouts, in the order of ``groups``, the ids of all. ``held``: all rollouts on the
        main rank; None on others."""
        ...

    def barrier(self) -> None:
        """Wait until every rank calls this."""
        ...


class RolloutEngine(Protocol):
    """Generates rollouts with the policy's current weights."""

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, temperature: float | None = None
    ) -> RolloutBatch:
        """Generate ``group_size`` rollouts of each prompt; those of a prompt are in consecutive rows.

        ``temperature`` overrides the configured one; 0 takes the likeliest token.

        The same ``seed`` gives the same rollouts whatever the parallel layout and batch size. Each rank gets those of
        its part of the prompts, a consecutive one, which may be empty. All fields up to ``rows`` are filled in, and
        ``rollout_logprobs`` and ``entropies`` if the engine knows them.
        """
        ...

    def update_weights(self, policy: WeightSource) -> None:
        """Load the weights of ``policy`` after an update. Does nothing if engine and policy share them."""
        ...

    def sleep(self) -> None:
        """Free GPU memory for training, if engine and trainer share the GPUs."""
        ...

    def wake(self) -> None:
        """Take the GPU memory back, before generating."""
        ...

    def close(self) -> None:
        """End the processes that the engine started."""
        ...
