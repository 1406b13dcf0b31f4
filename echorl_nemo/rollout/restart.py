"""A rollout engine with processes of its own, started again once if it dies or hangs."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.errors import SharedError
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.rollout.engine import EngineError, RolloutEngine, WeightSource

T = TypeVar("T")


class RestartingEngine:
    """See `RolloutEngine`. Every rank sees a failure, and starts the engine anew with the policy's current weights; one
    that fails again in the same call ends the run, with the end of its log."""

    def __init__(self, start: Callable[[], RolloutEngine], policy: WeightSource) -> None:
        """``start``: gives a running engine with the weights of `model.path`; every rank calls it."""
        self._start, self._policy = start, policy
        self.engine = start()
        self.restarts = 0
        """Since the run, or this attempt at it, began."""

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, temperature: float | None = None
    ) -> RolloutBatch:
        return self._once_more(
            lambda: self.engine.generate(prompts, group_size, seed=seed, temperature=temperature), "generating"
        )

    def update_weights(self, policy: WeightSource) -> None:
        self._once_more(lambda: self.engine.update_weights(policy), "taking over the weights")

    def sleep(self) -> None:
        self._once_more(lambda: self.engine.sleep(), "giving its memory back")

    def wake(self) -> None:
        self._once_more(lambda: self.engine.wake(), "taking its memory")

    def close(self) -> None:
        self.engine.close()

    def _once_more(self, work: Callable[[], T], what: str) -> T:
        try:
            return work()
        except EngineError as failure:
            logging.getLogger(__name__).error(
                "the rollout engine failed while %s: %s; starting it again with the current weights", what, failure
            )
            self.engine.close()
            try:
                self.engine = self._start()
                self.engine.update_weights(self._policy)
                self.restarts += 1
                return work()
            except EngineError as again:
                raise SharedError(
                    f"the rollout engine failed while {what}, and again after a restart: {again}; go on from the "
                    f"newest checkpoint with trainer.resume=true\nthe end of its log:\n{again.log}"
                ) from failure
