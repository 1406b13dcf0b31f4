"""The final answer of a response, as its vote among other responses."""

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
    r"""What votes for a response: the last \boxed{} or \fbox{}; without one what follows the last `####`, `A:`,
    `Answer:` or `answer is`, to the end of its line. Spaces and a closing dot are left out; empty if there is none.
    The time is linear in the response."""
    box = last_box(response)
    text = box[1] if box is not None else _marked(response)
    return "".join(text.split()).rstrip(".*$`")


def _marked(response: str) -> str:
    """What follows the last marker that anything follows."""
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
