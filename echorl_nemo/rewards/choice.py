"""The letter of a multiple-choice answer."""

import re

_LETTER = re.compile(r"(?:\\boxed\s*\{\s*(?:\\text\s*\{)?|[Aa]nswer(?:\s+is)?\s*:?\s*\(?)\s*([A-J])\b")


def choice(response: str, answer: str) -> float:
    """1.0 if the last letter that the response boxes, or names as `Answer: X`, is the reference; else 0.0."""
    found = _LETTER.findall(response)
    return float(bool(found) and found[-1] == answer.strip().upper())
