"""Verifies the rollouts of a batch; the ranks that hold the same rollouts share the work."""

from typing import Any

import torch
import torch.distributed as dist

from echorl_nemo.engines.megatron.parallel import Parallel
from echorl_nemo.rewards import VerifierPool
from echorl_nemo.rollout.batch import RolloutBatch


def verify_rollouts(batch: RolloutBatch, verifiers: VerifierPool, parallel: Parallel) -> list[dict[str, str]]:
    """Fill in ``batch.rewards``, from the first verifier, and ``batch.reward_parts``, from each. Returns prompt,
    answer, verifier and failure of each verdict on these rollouts that was not reached. Every rank must call this."""
    mine = range(parallel.share_rank, len(batch), parallel.share_size)
    verdicts = verifiers.score(
        [(batch.responses[row], batch.answers[row]) for row in mine], [batch.rows[row] for row in mine if batch.rows]
    )
    found = [(name, row, verdict) for name in verdicts for row, verdict in zip(mine, verdicts[name], strict=True)]
    gathered: list[Any] = [None] * parallel.share_size
    dist.all_gather_object(gathered, found, group=parallel.share_host_group)
    batch.reward_parts = {name: torch.zeros(len(batch)) for name in verifiers.names}
    failures = []
    for name, row, verdict in sorted((item for part in gathered for item in part), key=lambda item: item[:2]):
        batch.reward_parts[name][row] = verdict.reward
        if verdict.failure:
            about = {"prompt": batch.prompts[row], "answer": batch.answers[row]}
            failures.append({**about, "verifier": name, "failure": verdict.failure})
    batch.rewards = batch.reward_parts[verifiers.names[0]]
    return failures
