"""Verifiers of a user who had a bad day; imported by worker processes."""

import os
import time

NUMBER = 1


def answers_length(response: str, answer: str) -> float:
    return float(str(len(response)) == answer)


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
