"""The method: steps, step entropy, EchoClips, clip loss. Imports torch alone; every function is pure."""

from echorl_nemo.echo.clips import ClipSelection, select_clips
from echorl_nemo.echo.config import EchoRLConfig
from echorl_nemo.echo.entropy import step_entropy
from echorl_nemo.echo.loss import clip_denominator, clip_loss
from echorl_nemo.echo.steps import boundary_ids, segment_steps

__all__ = [
    "ClipSelection",
    "EchoRLConfig",
    "boundary_ids",
    "clip_denominator",
    "clip_loss",
    "segment_steps",
    "select_clips",
    "step_entropy",
]
