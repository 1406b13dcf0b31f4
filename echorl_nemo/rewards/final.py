"""The final answer of a response, as its vote among other responses."""

import re

from echorl_nemo.rewards.boxed import last_box

_MARK = re.compile(
    r"####|<answer>|^[ \t]*A(?=[ \t]*:)"
    r"|\banswers?(?:\sto\s(?:the|this|that)\s(?:question|problem))?[*_]*\s*(?=[:=\uff1a]|is\b)",
    re.MULTILINE | re.IGNORECASE,
)
_LEAD = re.compile(r"(?:[\s:*$=`\uff1a]|is\b|\\[(\[])*")
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
    found = ""
    for mark in _MARK.finditer(response):
        start = mark.end()
        while start < len(response) and (response[start].isspace() or response[start] in ":*$=\uff1a"):
            start += 1
        end = response.find("\n", start)
        line = response[start : end if end >= 0 else len(response)]
        if line.startswith("is") and not line[2:].strip():  # the answer stands on a line of its own
            following = response[start + 2 :].lstrip()
            line = following[: following.find("\n")] if "\n" in following else following
        lead = _LEAD.match(line)
        assert lead is not None  # it matches the empty text too
        text = _END.split(line[lead.end() :])[0].strip()
        found = text or found
    return found
