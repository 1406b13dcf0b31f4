"""Recognises a full disk, and explains it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echorl_nemo.errors import UserError


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk, or a quota on it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk, while the run in ``folder`` writes any of its files, into a UserError with the
    remedy."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"trainer.run_dir={folder}: {error}; make room, then go on from its newest checkpoint with "
            "trainer.resume=true"
        ) from error
