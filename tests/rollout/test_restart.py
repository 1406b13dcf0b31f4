"""When a failing engine is started again, and when it is not."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from echorl_nemo.errors import SharedError
from echorl_nemo.resilience.stop import StopSignals, preserve_signal_handlers
from echorl_nemo.rollout.engine import EngineError
from echorl_nemo.rollout.restart import MAX_RESTARTS, RestartingEngine


class Engine:
    """Works for so many calls, then is dead."""

    made: list["Engine"]

    def __init__(self, calls: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does, in a way
        self.left, self.closed, self.weights = calls, False, 0
        Engine.made.append(self)

    def generate(self, prompts: Sequence[Any], group_size: int, **options: Any) -> Any:
        if not self.left:
            raise EngineError("dead", "its last words")
        self.left -= 1
        return len(Engine.made)

    def update_weights(self, policy: Any) -> None:
        self.weights += 1

    def close(self) -> None:
        self.closed = True


def restarting(calls: int) -> Any:
    Engine.made = []
    return RestartingEngine(lambda: Engine(calls), object(), is_main=True)  # type: ignore[arg-type, return-value]


def test_an_engine_is_replaced_by_one_with_the_current_weights() -> None:
    engine = restarting(1)
    assert [engine.generate([], 1, seed=0) for _ in range(2)] == [1, 2]
    first, second = Engine.made
    assert first.closed and not second.closed and second.weights == 1 and engine.restarts == 1


def test_one_that_is_dead_again_at_once_is_fatal() -> None:
    with pytest.raises(
        SharedError, match="failed while generating, and again after a restart: dead; (.|\n)*last words"
    ):
        restarting(0).generate([], 1, seed=0)


def test_one_that_fails_again_and_again_is_fatal() -> None:
    engine = restarting(1)
    for _ in range(1 + MAX_RESTARTS):
        engine.generate([], 1, seed=0)
    with pytest.raises(SharedError, match="failed while generating, after 3 restarts: dead"):
        engine.generate([], 1, seed=0)


def test_an_engine_that_takes_the_signals_does_not_keep_them() -> None:
    with preserve_signal_handlers():
        signals = StopSignals().listen()
        engine = restarting(1)
        for _ in range(2):
            engine.generate([], 1, seed=0)
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
