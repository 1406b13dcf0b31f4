"""Verifiers of a user who had a bad day; imported by worker processes."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

NUMBER = 1


def answers_length(response: str, answer: str) -> float:
    return float(str(len(response)) == answer)


def asks_the_row(response: str, answer: str, row: Mapping[str, Any]) -> float:
    return float(response == answer == row["answer"] and row["tests"] == ["assert f(1) == 2"])


def with_options(response: str, answer: str, strict: bool = True) -> float:
    return float(response == answer or not strict)


def of_four(response: str, answer: str, row: object, more: object) -> float:
    return 0.0


def numpy_numbers(response: str, answer: str) -> object:
    import numpy as np
    import torch

    return {"float32": np.float32(1.0), "bool": np.bool_(True), "tensor": torch.tensor(1.0), "huge": 1e300}[response]


class _NeedsTwoError(Exception):
    """One that does not unpickle."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("oops")


def raises_oddly(response: str, answer: str) -> object:
    match response:
        case "exit":
            sys.exit(0)
        case "interrupt":
            raise KeyboardInterrupt
        case "two":
            raise _NeedsTwoError(1, 2)
        case "surrogate":
            raise ValueError("\ud83d" + "x" * 12_000)
        case "array":
            import numpy as np

            return np.zeros(2)
        case "complex":
            return 1j
    return 1.0


def forks(response: str, answer: str) -> float:
    """Leaves a child in a session of its own, and one in the worker's."""
    for own_session in (True, False):
        subprocess.Popen(["sleep", "600"], start_new_session=own_session)
    if response == "hang":
        time.sleep(600)
    return 1.0


def misbehave(response: str, answer: str) -> object:
    match response:
        case "hang":
            time.sleep(600)
        case "crash":
            os._exit(3)
        case "raise":
            raise KeyError("lost")
        case "fork":
            os.fork()
        case "print":
            print("a verifier speaks")
        case "string":
            return "1.0"
        case "nan":
            return float("nan")
    return float(answer == "right")


def hangs_at_times(response: str, answer: str) -> float:
    if "=3" in response:
        time.sleep(600)
    return float(response.rstrip().endswith(f"A:{answer}"))


def hangs_on_four(response: str, answer: str) -> float:
    if answer == "4":
        time.sleep(600)
    return 0.5
