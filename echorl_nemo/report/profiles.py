"""Step-entropy profiles: how high a model's step entropies are along a response, and where they peak."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from echorl_nemo.echo import step_entropy

BINS = 10


def entropy_profile(entropies: Tensor, step_ids: Tensor, *, reduction: str) -> dict[str, Any]:
    """The profile of responses [N, S] with at least one step: `by_position`, the mean step entropy (nats) in each tenth
    of a response's steps (null if no step falls there); `peak_position`, the share of responses with the peak in each
    tenth; `peak_height`, quantiles of the peak's entropy; and counts."""
    heights = step_entropy(entropies, step_ids, reduction=reduction)
    n_steps = (heights > -torch.inf).sum(dim=1)
    heights, n_steps = heights[n_steps > 0], n_steps[n_steps > 0]
    if not len(heights):
        return {"responses": 0}
    position = (torch.arange(heights.shape[1]) + 0.5) / n_steps[:, None]
    inside = heights > -torch.inf
    bins = (position * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64).scatter_add_(0, bins[inside], heights[inside].double())
    counts = torch.bincount(bins[inside], minlength=BINS)
    peak_bins = bins.gather(1, heights.argmax(dim=1, keepdim=True))[:, 0]
    quantiles = heights.max(dim=1).values.double().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return {
        "responses": len(heights),
        "steps": float(n_steps.double().mean()),
        "by_position": [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)],
        "peak_position": (torch.bincount(peak_bins, minlength=BINS) / len(heights)).tolist(),
        "peak_height": dict(zip(("10%", "50%", "90%"), quantiles.tolist(), strict=True)),
    }


def draw_profiles(profiles: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a picture of ``profiles`` to ``path``: step entropy and share of peaks by relative position, with one curve
    for each kind of response."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    centres = [(n + 0.5) / BINS for n in range(BINS)]
    for name, values in profiles.items():
        if values["responses"]:
            label = f"{name} ({values['responses']})"
            known = [(x, y) for x, y in zip(centres, values["by_position"], strict=True) if y is not None]
            left.plot(*zip(*known, strict=True), marker=".", label=label)
            right.plot(centres, values["peak_position"], marker=".", label=label)
    left.set_title("step entropy, nats", fontsize=10)
    right.set_title("share of responses that peak here", fontsize=10)
    for panel in (left, right):
        panel.set_xlabel("relative position among the response's steps")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
