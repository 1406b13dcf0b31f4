"""The verifier `math`: compares answers mathematically, by math-verify."""

import re
from decimal import Decimal
from typing import Any

import sympy
from math_verify import parse, verify

from echorl_nemo.rewards.boxed import last_box
from echorl_nemo.rewards.final import final_answer

RELATIVE_TOLERANCE = 1e-6
"""Largest relative difference of a decimal and an exact number. math-verify compares six decimals, whatever the
size."""


def math_equal(response: str, answer: str) -> float:
    r"""1.0 if the response's final answer equals the reference mathematically; else 0.0.

    The final answer is the last \boxed{} or \fbox{}; without one, the last expression that math-verify finds, or the
    result of `final_answer`. math-verify's own time limits are off, since they use an alarm signal; `VerifierPool` has
    a time limit.
    """
    box = last_box(response)
    if box is not None:
        return _compare(box[1], answer, boxed=True)
    return _compare(response, answer, boxed=False) or _compare(final_answer(response), answer, boxed=True)


def _compare(text: str, answer: str, *, boxed: bool) -> float:
    given, percent = _without_percent(plain_numbers(text))
    gold, gold_percent = _without_percent(plain_numbers(answer))
    if _equal(given, gold, boxed=boxed):
        return 1.0
    # 50 % is read as 50; if only one side has the sign it is also read as 0.5
    if percent != gold_percent:
        hundredths = [rf"({side})/100" if sign else side for side, sign in ((given, percent), (gold, gold_percent))]
        return float(_equal(*hundredths, boxed=True))
    return 0.0


def _equal(given: str, gold: str, *, boxed: bool) -> bool:
    reference = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)
    found = parse(rf"\boxed{{{given}}}" if boxed else given, parsing_timeout=None)
    if not reference or not verify(reference, found, timeout_seconds=None):
        return False
    return _numbers_agree(reference[0], found[0])


def _numbers_agree(gold: Any, found: Any) -> bool:
    """False if both are numbers and differ: exact numbers at all, others by more than `RELATIVE_TOLERANCE`. Otherwise
    True."""
    if not all(isinstance(value, sympy.Expr) and value.is_number and value.is_finite for value in (gold, found)):
        return True
    difference = gold - found
    if not (gold.has(sympy.Float) or found.has(sympy.Float)):
        return bool(difference.equals(0))
    return bool(abs(difference.evalf()) <= RELATIVE_TOLERANCE * max(abs(gold.evalf()), abs(found.evalf())))


_COMMAND = r"(?<!\\)\\(?:[,;:! ]|thinspace\b|quad\b)"
_GROUPING = re.compile(rf"(?<=\d)(?:{_COMMAND}\s*|\{{,\}}|,\s*{_COMMAND}\s*|~|\s)(?=\d{{3}}(?!\d))")
_SPACES = re.compile(rf"{_COMMAND}|~")
_DEGREES = re.compile(r"°|\^\s*\{?\s*\\circ\s*\}?|\\degree\b")
_REPEATING = re.compile(r"(\d{0,30})\.(\d{0,30})(?:\\(?:overline|bar|dot)\s*(?:\{(\d{1,30})\}|(\d))|\((\d{1,30})\))")
_MIXED = re.compile(r"(?<![\d./^_{])(\d{1,30})\s+(\d{1,30})\s*/\s*(\d{1,30})(?![\d.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d{1,30}(?:\.\d{1,30})?)[eE]([+-]?\d{1,3})(?!\w)")
_FINAL_DOT = re.compile(r"(?<=\d)[.,]\s*$")


def plain_numbers(text: str) -> str:
    r"""``text`` with numbers such as `1\,234`, `90°`, `0.\overline{3}`, `1 1/2`, `1.5e3` and `5.` rewritten so that
    math-verify can read them."""
    text = _DEGREES.sub("", _SPACES.sub(" ", _GROUPING.sub("", text)))
    text = _REPEATING.sub(_fraction, text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    text = _SCIENTIFIC.sub(lambda number: format(Decimal(number[0]), "f"), text)
    return _FINAL_DOT.sub("", text)


def _without_percent(text: str) -> tuple[str, bool]:
    bare = re.sub(r"\\?%\s*$", "", text)
    return bare, bare != text


def _fraction(number: re.Match[str]) -> str:
    """A repeating decimal as a fraction: 0.1(6) is (16 - 1) / 90."""
    whole, fixed, repeated = number[1], number[2], number[3] or number[4] or number[5]
    before = int(f"{whole}{fixed}" or "0")
    return f"({int(whole + fixed + repeated) - before}/{10 ** len(fixed) * (10 ** len(repeated) - 1)})"
