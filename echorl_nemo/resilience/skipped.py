"""Batches of steps that were skipped, for a person to look at."""

import io
from dataclasses import asdict
from pathlib import Path

import torch

from echorl_nemo.rollout.batch import RolloutBatch

SKIPPED_FOLDER = "skipped"
KEPT = 10
"""Newest batches that are kept: one may take hundreds of megabytes."""


def keep_batch(run_dir: Path, step: int, batch: RolloutBatch, reason: str) -> Path:
    """Write the batch of ``step`` (from 0) with the reason; `torch.load` gives a dictionary of both."""
    folder = run_dir / SKIPPED_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step + 1:06d}.pt"
    content = io.BytesIO()  # on a full disk torch.save raises what says nothing of it
    torch.save({"reason": reason, "batch": asdict(batch)}, content)
    path.write_bytes(content.getbuffer())
    for old in sorted(folder.glob("step-*.pt"))[:-KEPT]:
        old.unlink()
    return path
