"""The folder of a run's checkpoints. Checkpoints are published by a rename, and checked before they are read.

A checkpoint is a folder `step-NNNNNN` with a manifest, which is the last file written before the folder gets that name.
Everything else in the folder was left behind by an interrupted save or removal.
"""

import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echorl_nemo.resilience.config import CheckpointConfig

CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 24

Checksums = dict[str, tuple[int, int]]
"""Size in bytes and CRC-32 by file name."""


@dataclass(frozen=True)
class CheckpointFolder:
    """`run_dir`/checkpoints. Only the main rank changes it."""

    path: Path

    def complete(self) -> list[Path]:
        """The complete checkpoints, newest first."""
        found = [path for path in self.path.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name)]
        return sorted((path for path in found if (path / MANIFEST).is_file()), key=step_of, reverse=True)

    def without_manifest(self) -> list[Path]:
        """Damaged checkpoints: folders with the name of a checkpoint that have no manifest."""
        found = [path for path in self.path.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name)]
        return sorted((path for path in found if not (path / MANIFEST).is_file()), key=step_of, reverse=True)

    def begin(self, step: int) -> Path:
        """Create a new temporary folder for the checkpoint of ``step``; no earlier attempt writes there."""
        partial = self.path / f"{name_of(step)}.partial-{secrets.token_hex(4)}"
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, sums: Checksums, *, accuracy: float | None) -> Path:
        """Write the manifest of ``partial`` and give it its final name. All its files must be in ``sums`` and on the
        disk. Returns the checkpoint."""
        final = _final(partial)
        write_durably(partial / MANIFEST, json.dumps({"accuracy": accuracy, "files": sums}, indent=1))
        _sync(partial)
        before = self._hide(final) if final.exists() else None
        partial.rename(final)  # killed just before this: `clean` gives it its name
        _sync(self.path)
        if before is not None:
            _delete(before)
        return final

    def remove(self, checkpoint: Path) -> None:
        """Delete a folder if it exists. It is renamed first, so that a half-deleted checkpoint is never loaded, and a
        writer that outlived its run cannot add a file to it."""
        if checkpoint.exists():
            _delete(self._hide(checkpoint))

    def clean(self) -> list[str]:
        """Remove what interrupted saves left; a folder that was complete except for its name gets the name. Returns a
        sentence about each."""
        done = []
        for leftover in sorted(self.path.glob("step-*.partial-*")):
            final = _final(leftover)
            if (leftover / MANIFEST).is_file() and not final.exists():
                leftover.rename(final)
                done.append(f"{leftover.name} was complete: it is {final.name}")
            else:
                self.remove(leftover)
                done.append(f"{leftover.name} was left by an interrupted save or removal: removed")
        return done

    def _hide(self, checkpoint: Path) -> Path:
        gone = self.path / f"{_final(checkpoint).name}.partial-{secrets.token_hex(4)}"
        checkpoint.rename(gone)
        return gone

    def set_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint so that no run resumes from it, and return the new path. It is never removed."""
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{secrets.token_hex(4)}")
        checkpoint.rename(aside)
        return aside

    def retain(self, config: CheckpointConfig) -> list[Path]:
        """Remove the checkpoints that ``config`` does not keep, and return them."""
        complete = self.complete()
        rated = [(accuracy, step_of(path), path) for path in complete if (accuracy := accuracy_of(path)) is not None]
        best = [path for _, _, path in sorted(rated, reverse=True)[: config.keep_best]]
        every = config.keep_every
        dropped = [
            path
            for path in complete[config.keep_last :]
            if path not in best and not (every and step_of(path) % every == 0)
        ]
        for path in dropped:
            self.remove(path)
        return dropped


def _final(partial: Path) -> Path:
    return partial.with_name(partial.name.split(".partial-")[0])


def _delete(folder: Path) -> None:
    """Delete a folder, its manifest first: what is left after a kill is not a complete checkpoint."""
    if not folder.is_dir():  # a user's file
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def name_of(step: int) -> str:
    """The name of the checkpoint after ``step`` training steps."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Number of completed training steps, from the checkpoint's name."""
    match = CHECKPOINT_NAME.match(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def accuracy_of(checkpoint: Path) -> float | None:
    """The `eval.accuracy` of a complete checkpoint; None if it was not evaluated, or the manifest cannot be read."""
    try:
        accuracy = _read_manifest(checkpoint)["accuracy"]
    except ValueError:
        return None
    return None if accuracy is None else float(accuracy)


def checksum_files(folder: Path, names: Iterable[str]) -> Checksums:
    """Checksums of files in ``folder``. The files are on the disk (fsync) when this returns."""
    sums: Checksums = {}
    for name in names:
        with (folder / name).open("rb") as file:
            sums[name] = _sum(file)
            os.fsync(file.fileno())
    return sums


def damaged_files(checkpoint: Path, *, part: int, parts: int) -> list[str]:
    """Problems with every ``parts``-th file of a checkpoint, starting with the ``part``-th, so that ranks share the
    work.

    Raises OSError if the storage fails: then nothing is known about the checkpoint.
    """
    try:
        files = sorted(_read_manifest(checkpoint)["files"].items())
    except ValueError as error:
        return [str(error)] if part == 0 else []
    found = []
    for name, (size, crc) in files[part::parts]:
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        else:
            with path.open("rb") as file:
                if _sum(file)[1] != crc:
                    found.append(f"{name} was altered: its checksum differs")
    return found


def write_durably(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that the file is always complete, and on the disk when this returns."""
    partial = path.with_name(f"{path.name}.new")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError if it is damaged."""
    try:
        manifest = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
        accuracy, files = manifest["accuracy"], dict(manifest["files"])
        numbers = [number for size_and_sum in files.values() for number in size_and_sum]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error!r}") from error
    pairs = all(len(size_and_sum) == 2 for size_and_sum in files.values())
    known = accuracy is None or isinstance(accuracy, (int, float))
    if files and pairs and known and all(type(number) is int for number in numbers):
        return manifest
    raise ValueError(f"{MANIFEST} lacks its entries")


def _sum(file: Any) -> tuple[int, int]:
    size = crc = 0
    while chunk := file.read(CHUNK_BYTES):
        size += len(chunk)
        crc = zlib.crc32(chunk, crc)
    return size, crc


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
