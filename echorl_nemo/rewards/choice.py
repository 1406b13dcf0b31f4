"""The letter of a multiple-choice answer."""

import re

from echorl_nemo.rewards.boxed import last_box

LETTERS = "ABCDEFGHIJ"
WINDOW = 200
"""Characters after the word `answer` in which the letter must stand."""
_ANSWER = re.compile("answer", re.IGNORECASE)
_LEAD = re.compile(r"(?:\s|is\b|[*_`:=$-]|option\b|choice\b)*", re.IGNORECASE)
_DECORATION = re.compile(r"(?:\s|[*_`$(\[{]|\\(?:text|textbf|mathrm|mathbf|bf|rm)\b|\\[(\[])*")
_CLOSING = re.compile(r"(?:[*_`$)\]}]|\\[)\]])*")
_EXPLANATION = re.compile(r"\s*(?:$|[.:\n(\u2013\u2014-]|[,;]?\s*(?:is|because|since|as)\b)")
_ANOTHER = re.compile(r"\s*(?:[,;/&]|or\b|and\b)", re.IGNORECASE)


def choice(response: str, answer: str) -> float:
    """1.0 if the last letter that the response boxes, or names after the word `answer`, is the reference; else 0.0.

    A letter may be decorated: `(B)`, `**B**`, `$B$`, `\\text{B}`. Several letters are no answer. The time is linear in
    the response.
    """
    return float(chosen_letter(response) == letter_of(answer) != "")


def letter_of(answer: str) -> str:
    """The letter that a reference answer is, without its decoration: `(b).` is B. Empty if it is none."""
    letter, _, rest = _letter(answer.strip())
    return letter if rest.strip(" .") == "" else ""


def chosen_letter(response: str) -> str:
    """The letter that a response ends up with; empty if there is none, or several."""
    sites = []
    for word in _ANSWER.finditer(response):
        start = word.end()
        while start < len(response) and response[start].isspace():
            start += 1
        window = response[start : start + WINDOW]
        if letter := _named(window[_LEAD.match(window).end() :]):  # type: ignore[union-attr]
            sites.append((start, letter))
    box = last_box(response)
    if box is not None and (letter := _named(box[1][:WINDOW])):
        sites.append((box[0], letter))
    letter = max(sites, default=(0, ""))[1]
    return letter if letter in LETTERS else ""


SEVERAL = "several"


def _named(text: str) -> str:
    """The letter that ``text`` begins with, `SEVERAL` of a list of letters, empty of anything else."""
    letter, closing, rest = _letter(text)
    if not letter:
        return ""
    if (another := _ANOTHER.match(rest)) and _letter(rest[another.end() :])[0]:
        return SEVERAL
    return letter if ")" in closing or "}" in closing or _EXPLANATION.match(rest) else ""


def _letter(text: str) -> tuple[str, str, str]:
    """A decorated letter at the beginning of ``text``, the brackets that close after it, and the rest; an empty letter
    if there is none."""
    start = _DECORATION.match(text).end()  # type: ignore[union-attr]
    letter, after = text[start : start + 1].upper(), text[start + 1 : start + 2]
    if not letter or letter not in LETTERS or after.isalnum() or after in ("'", "\u2019"):
        return "", "", text
    closing = _CLOSING.match(text, start + 1)
    assert closing is not None  # it matches the empty text too
    return letter, closing[0], text[closing.end() :]
