"""A full disk, whatever it is that cannot be written."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echorl_nemo.errors import UserError


def is_full(error: OSError) -> bool:
    """Whether a disk, or a quota on it, has no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Metrics, rollouts, the heartbeat of the run in ``folder``: the remedy is the same. Raises UserError that names
    it."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"trainer.run_dir={folder}: {error}; make room, then go on from its newest checkpoint with "
            "trainer.resume=true"
        ) from error
