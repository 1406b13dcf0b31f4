"""Saves the batches of skipped steps, so that a person can look at them."""

import io
from dataclasses import asdict
from pathlib import Path

import torch

from echorl_nemo.rollout.batch import RolloutBatch

SKIPPED_FOLDER = "skipped"
KEPT = 10
"""Number of newest batches that are kept; one may take hundreds of megabytes."""


def save_skipped_batch(run_dir: Path, step: int, batch: RolloutBatch, reason: str) -> Path:
    """Write the batch of ``step`` (from 0) with the reason, and return the path. `torch.load` returns a dictionary with
    both."""
    folder = run_dir / SKIPPED_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step + 1:06d}.pt"
    content = io.BytesIO()  # on a full disk torch.save would raise an error that does not say so
    torch.save({"reason": reason, "batch": asdict(batch)}, content)
    path.write_bytes(content.getbuffer())
    for old in sorted(folder.glob("step-*.pt"))[:-KEPT]:
        old.unlink()
    return path
