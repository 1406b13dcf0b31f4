"""Draws the weights that each selection gives the tokens of one response, for docs/method.md.

python examples/draw_selections.py --out docs/images/selections.png
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from echorl_nemo.echo import EchoRLConfig, count_steps_before, segment_steps, select_clips

NEWLINE, STEPS = 0, (9, 11, 8, 12, 10, 7)
ROW = 3
"""The response that is drawn, among the eight."""
SELECTIONS: dict[str, dict[str, Any]] = {
    "the paper's clip (prefix, clip_mean)": {"normalizer": "clip_mean"},
    "full": {"span": "full"},
    "fork_tokens": {"span": "fork_tokens"},
    "survival": {"span": "survival"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    out = parser.parse_args().out
    tokens, entropies = make_responses()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    figure, axes = plt.subplots(
        len(SELECTIONS) + 1, 1, figsize=(8, 6.5), sharex=True, gridspec_kw={"height_ratios": [2, 1, 1, 1, 1]}
    )
    positions = range(tokens.shape[1])
    axes[0].bar(positions, entropies[ROW], color="#3b82c4")
    axes[0].set_ylabel("entropy, nats")
    axes[0].set_title("one of eight verified successes; dotted: the ends of its steps", fontsize=9)
    for axis, (name, settings) in zip(axes[1:], SELECTIONS.items(), strict=True):
        weight = select_clips(
            entropies, segment_steps(tokens, mask, [NEWLINE]), rewards=torch.ones(len(tokens)),
            finished=torch.ones(len(tokens), dtype=torch.bool), group_ids=torch.arange(len(tokens)),
            config=EchoRLConfig(**{"per_group": "all", "normalizer": "clip_tokens", **settings}),
            steps_before=count_steps_before(tokens, mask, [NEWLINE]),
        ).weight[ROW]  # fmt: skip
        axis.bar(positions, weight / weight.max(), color="#0a7d5a")
        axis.set_ylim(0, 1.1)
        axis.set_yticks([0, 1])
        axis.set_ylabel(name.split(" (")[0].replace("the paper's clip", "paper"), fontsize=8)
    for axis in axes:
        for end in torch.tensor(STEPS).cumsum(0).tolist():
            axis.axvline(end - 0.5, color="grey", linestyle=":", linewidth=1)
    axes[-1].set_xlabel("token; a weight is shown as a share of the response's largest")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def make_responses() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight responses of six steps: a few tokens decide, and the step with most of them differs."""
    generator = torch.Generator().manual_seed(2)
    length = sum(STEPS)
    tokens = torch.ones(8, length, dtype=torch.long)
    tokens[:, torch.tensor(STEPS).cumsum(0) - 1] = NEWLINE
    tokens[:, -1] = 1
    entropies = 0.15 * torch.rand(8, length, generator=generator)
    forks = torch.rand(8, length, generator=generator) < 0.15
    entropies[forks] += 2 * torch.rand(int(forks.sum()), generator=generator)
    return tokens, entropies


if __name__ == "__main__":
    main()
