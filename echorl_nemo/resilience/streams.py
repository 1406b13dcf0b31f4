"""Output that nobody can read any more costs a run nothing: a terminal that hung up, a pipe without a reader, a log on
a full disk. The first write that fails is the last that is tried."""

import os
import sys
from typing import Any


class PatientStream:
    """A text stream whose failures to write are not raised."""

    def __init__(self, stream: Any, descriptor: int) -> None:
        """``descriptor``: the file that ``stream`` writes to."""
        self._stream, self._descriptor = stream, descriptor

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._write_to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._write_to_nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write_to_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)
        os.close(nowhere)


def make_output_patient() -> None:
    """Of this process, standard output and standard error."""
    if not isinstance(sys.stdout, PatientStream):
        sys.stdout, sys.stderr = PatientStream(sys.stdout, 1), PatientStream(sys.stderr, 2)
