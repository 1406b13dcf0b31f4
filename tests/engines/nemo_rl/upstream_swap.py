"""A pytest plugin: NeMo-RL's own loss tests with our loss, at coef 0, in place of its own.

    PYTHONPATH=.:$NEMO_RL_HOME python -m pytest -p tests.engines.nemo_rl.upstream_swap \\
        $NEMO_RL_HOME/tests/unit/algorithms/test_loss_functions.py -k clipped_pg

They ask for CUDA: here the CPU answers.
"""

from typing import Any

import nemo_rl.algorithms.loss as loss_package
import torch
from nemo_rl.algorithms.loss import loss_functions

from echorl_nemo.engines.nemo_rl.loss import EchoClippedPGLossFn


class AtCoefficientZero(EchoClippedPGLossFn):
    """For configurations that know nothing of EchoRL."""

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(cfg, dict):
            cfg = {**cfg, "echorl": {"coef": 0.0}}
        else:
            cfg = cfg.model_copy(update={"echorl": {"coef": 0.0}})
        super().__init__(cfg, *args, **kwargs)


for module in (loss_package, loss_functions):
    setattr(module, "ClippedPGLossFn", AtCoefficientZero)  # noqa: B010

if not torch.cuda.is_available():
    from echorl_nemo.engines.megatron.cpu import _CudaMeansCpu

    _CudaMeansCpu().__enter__()
    torch.cuda.is_available = lambda: True
