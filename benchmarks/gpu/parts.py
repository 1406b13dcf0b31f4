"""Runs the parts of a check one after another, each in a process group of its own with a time limit, and writes what
they found to one JSON file and what they printed to one log."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from echorl_nemo.shipped import ROOT


@dataclass(frozen=True)
class Part:
    """One part: a command that may write its figures to a JSON file."""

    name: str
    what: str
    command: Sequence[str]
    """Arguments for this Python."""
    limit: float
    """Seconds after which it is ended."""
    figures: Callable[[Path], Any] = lambda folder: None
    """Reads the part's figures from the folder of working files."""
    skipped: str = ""
    """Why it is not run here; empty if it is."""


@dataclass
class Result:
    """What became of a part."""

    ok: bool
    seconds: float
    reason: str = ""
    """Why it is not `ok`, or was not run."""
    figures: Any = None


@dataclass
class Check:
    """The parts of a check and their results, which are written after each part: what is there is not lost."""

    parts: Sequence[Part]
    work: Path
    """Folder of working files."""
    json_file: Path
    log_file: Path
    about: dict[str, Any]
    """Machine, versions and settings, for the JSON file."""
    seconds: float
    """Time for all parts together."""
    results: dict[str, Result] = field(default_factory=dict)

    def run(self) -> bool:
        """Run every part, whatever became of those before. Returns whether each that was run is right."""
        deadline = time.monotonic() + self.seconds
        self.log_file.write_text("", encoding="utf-8")
        for part in self.parts:
            left = deadline - time.monotonic()
            if part.skipped:
                result = Result(True, 0.0, f"not run: {part.skipped}")
            elif left <= 0:
                result = Result(False, 0.0, f"not run: the {self.seconds:.0f} seconds of all parts are over")
            else:
                result = self._run_part(part, min(part.limit, left))
            self.results[part.name] = result
            self._write()
            print(f"{part.name:<12} {'right' if result.ok else 'WRONG':<6} {result.seconds:5.0f} s  {result.reason}")
        return all(result.ok for result in self.results.values())

    def _run_part(self, part: Part, limit: float) -> Result:
        start = time.monotonic()
        with self.log_file.open("a", encoding="utf-8") as log:
            log.write(f"\n=== {part.name}: {part.what}\n=== python {' '.join(part.command)}\n")
            log.flush()
            code = run_in_group([sys.executable, *part.command], limit, log)
        seconds = time.monotonic() - start
        if code is None:
            return Result(False, seconds, f"ended after {limit:.0f} seconds; the log says how far it came")
        try:
            figures = part.figures(self.work)
        except (OSError, ValueError, LookupError) as error:
            return Result(False, seconds, f"exit code {code}, and its figures cannot be read: {error!r}")
        return Result(code == 0, seconds, "" if code == 0 else f"exit code {code}; see the log", figures)

    def _write(self) -> None:
        content = {**self.about, "parts": {name: asdict(result) for name, result in self.results.items()}}
        self.json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run_in_group(command: Sequence[str], limit: float, log: Any) -> int | None:
    """Run ``command`` in the repository with its output in ``log``. Returns the exit code; None if it took longer than
    ``limit`` seconds and was killed. No process that it started is left either way."""
    process = start_in_group(command, log)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_group(process)


def start_in_group(command: Sequence[str], log: Any) -> "subprocess.Popen[bytes]":
    """Start ``command`` in the repository, as the leader of a process group of its own."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL every process of the group that ``process`` leads, and those below it that lead groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for below in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                below.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
