"""Restarts a rollout engine with separate processes if it dies or hangs."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from echorl_nemo.data.prompts import Prompt
from echorl_nemo.errors import SharedError
from echorl_nemo.resilience.stop import preserve_signal_handlers
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.rollout.engine import EngineError, RolloutEngine, WeightSource

T = TypeVar("T")

MAX_RESTARTS = 3
"""Restarts in one attempt at a run. An engine that fails more often has a cause that a restart does not remove."""


class RestartingEngine:
    """A `RolloutEngine` that wraps another one and restarts it, with the policy's current weights, after an
    EngineError. If the engine fails again in the same call, or too often, SharedError ends the run with the end of its
    log."""

    def __init__(self, start: Callable[[], RolloutEngine], policy: WeightSource, *, is_main: bool) -> None:
        """``start``: returns a running engine with the weights of `model.path`; every rank calls it. ``is_main``:
        whether this is the main rank, which logs."""
        self._start, self._policy, self._is_main = start, policy, is_main
        self.restarts = 0
        """Number of restarts since this attempt at the run began."""
        with preserve_signal_handlers():
            self.engine = start()

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, *, seed: int, temperature: float | None = None
    ) -> RolloutBatch:
        return self._with_restart(
            lambda: self.engine.generate(prompts, group_size, seed=seed, temperature=temperature), "generating"
        )

    def update_weights(self, policy: WeightSource) -> None:
        self._with_restart(lambda: self.engine.update_weights(policy), "taking over the weights")

    def sleep(self) -> None:
        self._with_restart(lambda: self.engine.sleep(), "giving its memory back")

    def wake(self) -> None:
        self._with_restart(lambda: self.engine.wake(), "taking its memory")

    def close(self) -> None:
        self.engine.close()

    def _with_restart(self, work: Callable[[], T], what: str) -> T:
        try:
            return work()
        except EngineError as failure:
            if self.restarts == MAX_RESTARTS:
                raise _fatal(f"failed while {what}, after {MAX_RESTARTS} restarts", failure) from failure
            if self._is_main:
                logging.getLogger(__name__).error(
                    "the rollout engine failed while %s: %s; starting it again with the current weights", what, failure
                )
            self.restarts += 1
            try:
                self.engine.close()
                with preserve_signal_handlers():
                    self.engine = self._start()
                self.engine.update_weights(self._policy)
                return work()
            except EngineError as again:
                raise _fatal(f"failed while {what}, and again after a restart", again) from failure


def _fatal(what: str, failure: EngineError) -> SharedError:
    return SharedError(
        f"the rollout engine {what}: {failure}; go on from the newest checkpoint with trainer.resume=true\n"
        f"the end of its log:\n{failure.log}"
    )
