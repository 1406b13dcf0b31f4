"""Runs verifiers in worker processes with a time limit, so that one which hangs, crashes or prints cannot stop a
run."""

import math
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import cache
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from echorl_nemo.resilience.orphans import adopt_orphans, die_with_parent, kill_orphans, mark_child_processes
from echorl_nemo.rewards.verifiers import IN_PROCESS, Verifier, find_verifier, takes_row

TIMED_OUT = "timed out"
"""Beginning of the `failure` of a verdict that took too long."""


FAILURE_CHARACTERS = 2000
LARGEST_REWARD = 1e6
"""Largest absolute reward: rewards are float32, and their squares are summed over a group."""


@dataclass(frozen=True)
class Verdict:
    """The result of a verifier for one response."""

    reward: float
    failure: str = ""
    """The reason if the verifier gave no result: `timed out`, `crashed`, or what it raised. Then the reward is 0."""


class VerifierPool:
    """Runs verifiers on pairs of response and reference answer."""

    def __init__(self, names: Sequence[str], *, workers: int, timeout_seconds: float) -> None:
        """``names``: as in `find_verifier`. Worker processes start with the first pair that needs one."""
        self.names = tuple(names)
        self._workers, self._timeout = workers, timeout_seconds
        self._pool: ProcessPool | None = None

    def score(
        self, pairs: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, list[Verdict]]:
        """The verdicts on (response, answer) pairs, in order, by verifier. ``rows``: the row of the data for each pair,
        for verifiers that take one; may be empty otherwise."""
        return {name: self._score(name, pairs, rows) for name in self.names}

    def close(self) -> None:
        """End the worker processes, and the processes that verifiers started in them."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None
            kill_orphans()

    def _score(self, name: str, pairs: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        if name in IN_PROCESS:
            verifier = find_verifier(name)
            return [Verdict(verifier(*pair)) for pair in pairs]
        if self._pool is None:
            adopt_orphans()
            # spawned, since a forked process would share the threads and sockets of the rank
            self._pool = ProcessPool(
                max_workers=self._workers,
                initializer=_start_worker,
                initargs=[self.names, os.getpid()],
                context=multiprocessing.get_context("spawn"),
            )
        wanted = rows or [{}] * len(pairs)
        futures = [
            self._pool.schedule(_verify, args=[name, *pair, row], timeout=self._timeout)
            for pair, row in zip(pairs, wanted, strict=True)
        ]
        verdicts = [self._verdict(future) for future in futures]
        if any(verdict.failure for verdict in verdicts):  # a killed worker may have left its children
            kill_orphans()
        return verdicts

    def _verdict(self, future: ProcessFuture) -> Verdict:
        try:
            reward, failure = future.result()
            return Verdict(reward, failure)
        except FutureTimeoutError:
            return Verdict(0.0, f"{TIMED_OUT} after {self._timeout} s")
        except ProcessExpired as error:
            return Verdict(0.0, f"crashed with exit code {error.exitcode}")


def _start_worker(names: Sequence[str], rank: int) -> None:
    die_with_parent(rank)
    os.setsid()  # its session identifies what a verifier forks, and ctrl-C of a terminal does not reach it
    mark_child_processes()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a verifier prints is not output of the run
    for name in names:
        _cached_verifier(name)  # imports do not count against the first pair's time


@cache
def _cached_verifier(name: str) -> Verifier:
    return find_verifier(name)


def _verify(name: str, response: str, answer: str, row: Mapping[str, Any]) -> tuple[float, str]:
    """Reward and failure as plain values: the rank might not be able to unpickle an object of the verifier's own."""
    worker, verifier = os.getpid(), _cached_verifier(name)
    try:
        given: Any = verifier(response, answer, row) if takes_row(verifier) else verifier(response, answer)
        reward, failure = _as_number(given), ""
    except BaseException as error:  # noqa: BLE001  whatever a user's verifier raises, sys.exit() too, is a failed verdict
        reward, failure = 0.0, _plain(f"raised {type(error).__name__}: {error}")
    finally:
        if os.getpid() != worker:  # a process that the verifier forked must not return a second result
            os._exit(0)
    return reward, failure


def _as_number(reward: Any) -> float:
    """The reward that a verifier returned, as a float. Raises TypeError or ValueError if it is not a valid reward."""
    if callable(getattr(reward, "item", None)):  # a number of numpy or torch
        reward = reward.item()
    if not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise TypeError(f"returned {reward!r}, not a finite number")
    if abs(reward) > LARGEST_REWARD:
        raise ValueError(f"returned {reward!r}; rewards must lie in [{-LARGEST_REWARD:g}, {LARGEST_REWARD:g}]")
    return float(reward)


def _plain(text: str) -> str:
    """``text`` cut to `FAILURE_CHARACTERS`, and escaped so that it can be written as UTF-8."""
    return text[:FAILURE_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")
