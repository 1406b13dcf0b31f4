"""The method: steps, step entropy, EchoClips, clip loss. Every function is pure; torch is the only dependency.

The functions are imported at their first use, so that reading a configuration does not import torch.
"""

from typing import TYPE_CHECKING, Any

from echorl_nemo.echo.config import EchoRLConfig

if TYPE_CHECKING:
    from echorl_nemo.echo.clips import ClipSelection, select_clips
    from echorl_nemo.echo.entropy import step_entropy
    from echorl_nemo.echo.loss import clip_denominator, clip_loss
    from echorl_nemo.echo.schedule import clip_coefficient
    from echorl_nemo.echo.steps import boundary_ids, count_steps_before, segment_steps

__all__ = [
    "ClipSelection",
    "EchoRLConfig",
    "boundary_ids",
    "clip_coefficient",
    "clip_denominator",
    "clip_loss",
    "count_steps_before",
    "segment_steps",
    "select_clips",
    "step_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from echorl_nemo.echo import clips, entropy, loss, schedule, steps

    return next(getattr(module, name) for module in (clips, entropy, loss, schedule, steps) if hasattr(module, name))
