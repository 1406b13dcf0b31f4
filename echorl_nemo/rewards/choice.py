"""The verifier `choice`: compares the letter of a multiple-choice answer."""

import re

from echorl_nemo.rewards.boxed import last_box

LETTERS = "ABCDEFGHIJ"
WINDOW = 200
"""Number of characters after a marker within which the letter must stand."""
_MARK = re.compile(r"answers?\b|correct\s(?:option|choice)\b|####", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:\s|(?:to\s(?:the|this|that)\s(?:question|problem)|is|should\sbe|would\sbe|must\sbe|will\sbe|option|choice)\b"
    r"|->|[>*_`:=\u2192\u2013\u2014\uff1a-]|<answer>)*",
    re.IGNORECASE,
)
_STYLE = r"\\(?:text|textbf|textit|textrm|emph|mathrm|mathbf|mathit|mathsf|mathtt|bf|rm)\b|\\[,;:! ]|~"
_DECORATION = re.compile(rf"(?:\s|[*_`$(\[{{<\"'\u201c\u2018]|{_STYLE}|\\[(\[])*")
_CLOSING = re.compile(rf"(?:[*_`$)\]}}>\"'\u201d\u2019]|{_STYLE}|\\[)\]])*")
_REASON = re.compile(r"\s*[,;:.]?\s*(?:because|since|as)\b", re.IGNORECASE)
_REJECTED = re.compile(r"\s*(?:is|was|are)\s+(?:not\b|wrong\b|incorrect\b|false\b)", re.IGNORECASE)
_EXPLANATION = re.compile(r"\s*(?:$|[\n<:;!,]|\.(?:\s|$|[*_$<])|[\u2013\u2014-]\s|is\b)|\s+(?:\(|\\[fb])|\s*\|")
_ANOTHER = re.compile(r"(?<![A-Za-z0-9'.-])[A-HJ](?![A-Za-z0-9'])(?!\s[a-z])")
"""A further letter in an answer. I does not count, nor a letter before a lower-case word (A good choice)."""
_LIST = re.compile(r"\s*(?:[,;/&|]|\bor\b|\band\b|-)", re.IGNORECASE)


def choice(response: str, answer: str) -> float:
    """1.0 if the last letter that the response boxes, or names after the word `answer`, is the reference; else 0.0.

    A letter may be decorated: `(B)`, `**B**`, `$B$`, `\\text{B}`. Several letters are not an answer. The time is linear
    in the response.
    """
    return float(chosen_letter(response) == letter_of(answer) != "")


def letter_of(answer: str) -> str:
    """The letter of a reference answer without its decoration: `(b).` gives B. Empty if the answer is not a letter."""
    letter, _, rest = _letter(answer.strip())
    return letter if rest.strip(" .") == "" else ""


def chosen_letter(response: str) -> str:
    """The letter that a response chooses in the end; empty if it chooses none, or several."""
    sites = []
    for word in _MARK.finditer(response):
        start = word.end()
        while start < len(response) and response[start].isspace():
            start += 1
        window = response[start : start + WINDOW]
        if letter := _named(window[_length(_LEAD, window) :]):
            sites.append((start, letter))
    box = last_box(response)
    if box is not None:
        content = box[1][:WINDOW]
        style = content[_length(_DECORATION, content) :]
        if letter := _named(style[_length(_LEAD, style) :], boxed=True):
            sites.append((box[0], letter))
    letter = max(sites, default=(0, ""))[1]
    return letter if letter in LETTERS else ""


SEVERAL = "several"


def _named(text: str, *, boxed: bool = False) -> str:
    """The letter that ``text`` begins with; `SEVERAL` for a list of letters; empty for anything else. ``boxed``:
    whether ``text`` is the whole content of a box."""
    letter, closing, rest = _letter(text)
    small = text[_length(_DECORATION, text) :][:1].islower()
    pronoun = letter == "I" and re.match(r"\s+[a-z]", rest) is not None
    if not letter or pronoun or _REJECTED.match(rest) or (small and rest.strip(" .\n*$")):
        return ""
    if listed := _LIST.match(rest):
        following, *_ = _letter(rest[listed.end() :])
        if following and not _REASON.match(rest):
            return SEVERAL
    if not _REASON.match(rest) and _ANOTHER.search(rest if boxed else _paragraph(rest)):
        return SEVERAL
    if _REASON.match(rest) or ")" in closing or "}" in closing or _EXPLANATION.match(rest):
        return letter
    return ""


def _paragraph(text: str) -> str:
    """``text`` up to the first line that is not a single letter; letters in successive lines are a list."""
    first, *lines = text.split("\n")
    single = next((n for n, line in enumerate(lines) if len(line.strip(" ().")) != 1), len(lines))
    return "\n".join([first, *lines[:single]])


def _letter(text: str) -> tuple[str, str, str]:
    """The letter at the beginning of ``text`` without its decoration, the brackets that close after it, and the rest.
    The letter is empty if there is none."""
    start = _length(_DECORATION, text)
    letter, after = text[start : start + 1].upper(), text[start + 1 : start + 2]
    if not letter or letter not in LETTERS or after.isalnum() or _contraction(text, start):
        return "", "", text
    closing = _length(_CLOSING, text, start + 1)
    return letter, text[start + 1 : closing], text[closing:]


def _contraction(text: str, start: int) -> bool:
    """Whether the letter belongs to a contraction such as I'm or I'd."""
    after = text[start + 1 : start + 3]
    return len(after) == 2 and after[0] in ("'", "\u2019") and after[1].isalpha()


def _length(pattern: re.Pattern[str], text: str, start: int = 0) -> int:
    """The end of the match of a pattern that also matches the empty text."""
    found = pattern.match(text, start)
    assert found is not None
    return found.end()
