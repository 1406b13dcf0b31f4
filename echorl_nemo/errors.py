"""Errors that a user can correct, and how they are printed."""

import difflib
import sys
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input. The message names the field, its value and the remedy. The command line prints it without a trace."""


class SharedError(UserError):
    """A UserError that every rank raises with the same message."""


def print_error(error: UserError) -> None:
    """Print each line of an error's message to standard error, after `error:`."""
    # in one write, since ranks share the stream
    sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; empty if it has none."""
    return (str(error).splitlines() or [""])[0]


def did_you_mean(key: str, keys: Sequence[str]) -> str:
    """The question `did you mean ...?` with the valid key that is most similar to ``key``."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"did you mean {close[0]}?"


def raise_problems(problems: Sequence[str]) -> None:
    """Raises UserError with all ``problems``, one a line, if there are any."""
    if problems:
        raise UserError("\n".join(problems))
