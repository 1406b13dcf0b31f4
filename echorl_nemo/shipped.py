"""The files that come with the package: configurations, the embedded task, the constraints for pip.

An installed package holds them in its own folder (see setup.py); in a checkout they are at the top level.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
"""Folder of `conf/`, `examples/` and constraints.txt."""

CONFIG_DIR = ROOT / "conf"
"""The configurations that commands read."""

CONSTRAINTS = ROOT / "constraints.txt"
"""Versions that were tested together, for `pip install -c`."""

ALIGNER_SCRIPT = ROOT / "examples" / "nemo_aligner" / "train_gpt_echo_grpo_actor.py"
"""The script that starts a run of NeMo-Aligner."""


def pinned(package: str) -> str:
    """The line `package==version` of constraints.txt. Raises LookupError if the package is not in it."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.partition("==")[0] == package]
    if not found:
        raise LookupError(f"{CONSTRAINTS} does not name {package}")
    return found[0]
