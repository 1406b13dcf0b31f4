"""Output streams that do not raise when writing fails, as on a closed terminal, a pipe without a reader, or a full
disk. After the first failure nothing more is written."""

import os
import sys
from typing import Any


class TolerantStream:
    """A text stream whose failures to write are not raised."""

    def __init__(self, stream: Any, descriptor: int) -> None:
        """``descriptor``: the file that ``stream`` writes to."""
        self._stream, self._descriptor = stream, descriptor

    def write(self, text: str) -> int:
        """Write ``text``; after a failure it is dropped."""
        try:
            return int(self._stream.write(text))
        except OSError:
            self._write_to_nowhere()
            return len(text)

    def flush(self) -> None:
        """Write out what is buffered; after a failure it is dropped."""
        try:
            self._stream.flush()
        except OSError:
            self._write_to_nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write_to_nowhere(self) -> None:
        """Redirect the descriptor to the null device."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)
        os.close(nowhere)


def tolerate_closed_output() -> None:
    """Replace standard output and standard error of this process by a `TolerantStream` each."""
    if not isinstance(sys.stdout, TolerantStream):
        sys.stdout, sys.stderr = TolerantStream(sys.stdout, 1), TolerantStream(sys.stderr, 2)
