"""Errors that a user can correct."""

import difflib
import sys
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input. The message names the field, its value and the remedy; the command line prints it without a trace."""


class SharedError(UserError):
    """The same on every rank."""


def print_error(error: UserError) -> None:
    """Print an error on standard error, for a person: a list of problems one a line."""
    sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))  # at once: ranks share it


def first_line(error: BaseException) -> str:
    """The first line of what an error says; empty if it says nothing."""
    return (str(error).splitlines() or [""])[0]


def nearest(key: str, keys: Sequence[str]) -> str:
    """Advice that names the valid key nearest to ``key``."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"did you mean {close[0]}?"
