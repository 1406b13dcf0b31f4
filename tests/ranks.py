"""Real gloo ranks for tests: processes forked from the test's, so that nothing is imported twice."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
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
            return [_result(rank, receiver) for rank, (receiver, _) in enumerate(pipes)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(timeout=5)
                process.kill()
                process.join()


def _result(rank: int, receiver: Connection) -> Any:
    if not receiver.poll(TIMEOUT.total_seconds()):
        raise AssertionError(f"rank {rank} gave no result in {TIMEOUT}")
    try:
        failure, value = pickle.loads(receiver.recv_bytes())
    except EOFError as error:
        raise AssertionError(f"rank {rank} died without a word") from error
    if failure:
        raise AssertionError(f"rank {rank} failed:\n{failure}")
    return value


def _rank(
    rank: int, world: int, rendezvous: str, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
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
