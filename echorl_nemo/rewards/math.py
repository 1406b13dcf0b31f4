"""Mathematical equality, by math-verify."""

from math_verify import parse, verify


def math_equal(response: str, answer: str) -> float:
    """1.0 if the response's final answer equals the reference mathematically; else 0.0.

    math-verify looks for the last boxed or final expression of the response, and limits its own time (seconds each)
    by an alarm signal: call it from the main thread.
    """
    gold = parse(rf"\boxed{{{answer}}}")
    return float(bool(gold) and verify(gold, parse(response)))
