"""Tests against the real NeMo-RL on the CPU: `make test-nemo-rl-real`, see docs/nemo_rl.md."""

import os

PRESENT = bool(os.environ.get("NEMO_RL_HOME"))
"""Whether there is a checkout of NeMo-RL, in whose environment this Python runs."""
NEEDED = (
    "needs a checkout of NeMo-RL with its submodules and a Python 3.13 with its packages: set NEMO_RL_HOME and "
    "NEMO_RL_PYTHON, see docs/nemo_rl.md"
)
