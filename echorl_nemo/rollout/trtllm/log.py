"""What TensorRT-LLM's workers printed: Ray keeps it, by worker, in its session's folder on their node."""

import os
from pathlib import Path

NEWEST_FILES = 4
LINES = 25
"""Of each file."""


def log_tail() -> str:
    """The last lines of the worker logs that were written last on this node."""
    folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
    files = [path for path in folder.glob("worker-*") if path.suffix in (".out", ".err") and path.stat().st_size]
    newest = sorted(files, key=lambda path: path.stat().st_mtime)[-NEWEST_FILES:]
    if not newest:
        return f"(no worker has written to {folder}; on other nodes, look there)"
    return "\n".join(
        f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-LINES:]) for path in newest
    )
