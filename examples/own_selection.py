"""A selection of one's own: fork tokens that come before the peak step, the other tokens at a tenth of the weight.

echorl-nemo quickstart echorl.span=own_selection:early_forks     # with this folder in PYTHONPATH
"""

import torch
from torch import Tensor

from echorl_nemo.echo.spans import SpanInputs, prefix


def early_forks(inputs: SpanInputs) -> Tensor:
    """[n, S] weights. The fifth of a clip's tokens with the highest entropy has weight 1."""
    clip = prefix(inputs)
    entropies = torch.where(clip > 0, inputs.entropies, torch.nan)
    least = entropies.nanquantile(0.8, dim=1, keepdim=True)
    return clip * torch.where(entropies >= least, 1.0, 0.1)
