"""Against the stand-ins, or a real checkout where `nemo_rl` can be imported (`make test-nemo-rl`)."""

import importlib.util

import torch

REAL = importlib.util.find_spec("nemo_rl") is not None
"""Whether NeMo-RL itself is here."""

if not REAL:
    from tests.engines.nemo_rl import stand_ins

    stand_ins.install()
elif not torch.cuda.is_available():
    from tests.engines.nemo_rl.real import shims

    shims.install()
