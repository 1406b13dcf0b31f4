"""Finds the final answer of a response, with which it votes among other responses."""

import re

from echorl_nemo.rewards.boxed import last_box

_MARK = re.compile(
    r"####|<answer>|^[ \t]*A(?=[ \t]*:)"
    r"|\banswers?(?:\sto\s(?:the|this|that)\s(?:question|problem))?[*_]*\s*(?=[:=\uff1a]|is\b)",
    re.MULTILINE | re.IGNORECASE,
)
_LEAD = re.compile(r"(?:[\s:*$=`\uff1a]+|is\b|\\[(\[])*")
_END = re.compile(r"</answer>|\.\s|\\[)\]]|<\||</s>")


def final_answer(response: str) -> str:
    r"""The final answer of a response: the content of the last \boxed{} or \fbox{}; without one the text after the last
    `####`, `A:`, `Answer:` or `answer is`, up to the end of its line. Spaces and a final dot are removed; empty if
    there is no answer. The time is linear in the response."""
    box = last_box(response)
    text = box[1] if box is not None else _marked(response)
    return "".join(text.split()).rstrip(".*$`")


def _marked(response: str) -> str:
    """The text after the last marker that is followed by any text."""
    for mark in reversed(list(_MARK.finditer(response))):
        lead = _LEAD.match(response, mark.end())
        assert lead is not None  # it matches the empty text too
        start = lead.end()
        if start == len(response) or _END.match(response, start):
            continue
        newline = response.find("\n", start)
        line = response[start : newline if newline >= 0 else len(response)]
        return _END.split(line, maxsplit=1)[0].strip()
    return ""
