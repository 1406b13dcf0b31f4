"""Verifiers in worker processes with a time limit: one that hangs, crashes or prints does not stop a run."""

import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import cache

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from echorl_nemo.resilience.orphans import die_with_parent
from echorl_nemo.rewards.verifiers import INSTANT, Verifier, find_verifier

TIMED_OUT = "timed out"
"""How the failure of a verifier that took too long begins."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier said of one response."""

    reward: float
    failure: str = ""
    """Why there is no answer: `timed out`, `crashed`, or what was raised; the reward is 0 then."""


class VerifierPool:
    """Runs verifiers on pairs of response and reference answer."""

    def __init__(self, names: Sequence[str], *, workers: int, timeout_seconds: float) -> None:
        """``names`` as in `find_verifier`. Worker processes start with the first pair that needs one."""
        self.names = tuple(names)
        self._workers, self._timeout = workers, timeout_seconds
        self._pool: ProcessPool | None = None

    def score(self, pairs: Sequence[tuple[str, str]]) -> dict[str, list[Verdict]]:
        """By verifier, the verdict on each (response, answer) pair, in order."""
        return {name: self._score(name, pairs) for name in self.names}

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _score(self, name: str, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        if name in INSTANT:
            return [Verdict(INSTANT[name](*pair)) for pair in pairs]
        if self._pool is None:
            # spawned: a fork would share the threads and sockets of a rank
            self._pool = ProcessPool(
                max_workers=self._workers,
                initializer=_start_worker,
                initargs=[self.names, os.getpid()],
                context=multiprocessing.get_context("spawn"),
            )
        futures = [self._pool.schedule(_verify, args=[name, *pair], timeout=self._timeout) for pair in pairs]
        return [self._verdict(future) for future in futures]

    def _verdict(self, future: ProcessFuture) -> Verdict:
        try:
            return Verdict(future.result())
        except FutureTimeoutError:
            return Verdict(0.0, f"{TIMED_OUT} after {self._timeout} s")
        except ProcessExpired as error:
            return Verdict(0.0, f"crashed with exit code {error.exitcode}")
        except Exception as error:  # noqa: BLE001  whatever a user's verifier raises is a failed verdict, and counted
            return Verdict(0.0, f"raised {type(error).__name__}: {error}")


def _start_worker(names: Sequence[str], rank: int) -> None:
    die_with_parent(rank)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a verifier prints is no output of the run
    for name in names:
        _cached_verifier(name)  # imports do not count against the first pair's time


@cache
def _cached_verifier(name: str) -> Verifier:
    return find_verifier(name)


def _verify(name: str, response: str, answer: str) -> float:
    worker = os.getpid()
    try:
        reward = _cached_verifier(name)(response, answer)
    finally:
        if os.getpid() != worker:  # a copy that the verifier forked must not answer too
            os._exit(0)
    if not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise TypeError(f"returned {reward!r}, not a finite number")
    return float(reward)
