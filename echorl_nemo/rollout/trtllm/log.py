"""Reads the logs of TensorRT-LLM's workers, which Ray keeps on their node in the folder of its session."""

import os
from pathlib import Path

NEWEST_FILES = 4
LINES = 25
"""Number of last lines that are read of each file."""


def log_tail() -> str:
    """The last lines of the newest worker logs on this node."""
    folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
    files = [path for path in folder.glob("worker-*") if path.suffix in (".out", ".err") and path.stat().st_size]
    newest = sorted(files, key=lambda path: path.stat().st_mtime)[-NEWEST_FILES:]
    if not newest:
        return f"(no worker has written to {folder}; look into this folder on the other nodes)"
    return "\n".join(
        f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-LINES:]) for path in newest
    )
