r"""Finds the content of \boxed{} and \fbox{} in one pass over a text."""

import re

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_box(text: str) -> tuple[int, str] | None:
    r"""(position, content) of the box that opens last among those that are closed; None if there is none.

    Braces in the content are balanced; \{ and \} do not count as braces. The time is linear in the text.
    """
    best: tuple[int, int] | None = None
    opened: list[int] = []  # position where the content of a box starts, 0 for another brace
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word == "}":
            start = opened.pop() if opened else 0
            if start and (best is None or start > best[0]):
                best = (start, token.start())
        elif word == "{":
            opened.append(0)
        elif len(word) > 2:
            opened.append(token.end())
    return None if best is None else (best[0], text[best[0] : best[1]])
