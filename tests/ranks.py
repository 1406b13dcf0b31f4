"""Real gloo ranks for tests: processes forked from the test's, so that nothing is imported twice."""

import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(seconds=240)


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on each of ``world`` ranks of a fresh gloo world; each rank's picklable result.

    Raises AssertionError with the trace of a rank that failed.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        pipes = [fork.Pipe(duplex=False) for _ in range(world)]
        processes = [
            fork.Process(target=_rank, args=(rank, world, rendezvous, pipes[rank][1], function, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _results([receiver for receiver, _ in pipes])
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(timeout=5)
                process.kill()
                process.join()


def _results(receivers: list[Connection]) -> list[Any]:
    """Each rank's result. The first rank to fail is the cause: what the others then say of lost peers is not."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, timeout=deadline - time.monotonic())
        if not ready:
            missing = sorted(set(range(len(receivers))) - set(results))
            raise AssertionError(f"ranks {missing} gave no result in {TIMEOUT}")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = receivers.index(receiver)
            try:
                failure, results[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError as error:
                raise AssertionError(f"rank {rank} died without a word") from error
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    rank: int, world: int, rendezvous: str, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # Megatron collects garbage at every save, and pytest's objects are many
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        answer: tuple[str, Any] = ("", function(*args))
    except BaseException:  # noqa: BLE001  carried to the test, which raises it
        answer = (traceback.format_exc(), None)
    sender.send_bytes(pickle.dumps(answer))  # plain bytes: torch would share memory with a process that is gone
    sender.close()
    if not answer[0] and dist.is_initialized():
        dist.barrier()  # a rank that is done early must not close connections that others still use
        dist.destroy_process_group()
