"""Mathematical equality, by math-verify."""

from math_verify import parse, verify


def math_equal(response: str, answer: str) -> float:
    """1.0 if the response's final answer equals the reference mathematically; else 0.0.

    math-verify looks for the last boxed or final expression of the response. Its own time limits are off, since they
    use an alarm signal; `VerifierPool` has one that works anywhere.
    """
    gold = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
    return float(bool(gold) and verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))
