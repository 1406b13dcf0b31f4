"""Errors that a user can mend."""

import difflib
import sys
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input. The message names the field, its value and the remedy; the command line prints it without a trace."""


class SharedError(UserError):
    """The same on every rank, so that the main one alone tells it."""


def tell(error: UserError, *, rank: int) -> None:
    """Print an error on standard error, for a person: a list of problems one a line, what every rank has once."""
    if not isinstance(error, SharedError):
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    elif rank == 0:
        print(f"error: {error}", file=sys.stderr)


def nearest(key: str, keys: Sequence[str]) -> str:
    """Advice that names the valid key nearest to ``key``."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"did you mean {close[0]}?"
