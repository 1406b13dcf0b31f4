"""Verifies the rollouts of a batch; the ranks of the run share the work."""

import torch
import torch.distributed as dist

from echorl_nemo.engines.megatron.parallel import Parallel
from echorl_nemo.rewards import VerifierPool
from echorl_nemo.rollout.batch import RolloutBatch


def verify_rollouts(batch: RolloutBatch, verifiers: VerifierPool, parallel: Parallel) -> list[dict[str, str]]:
    """Fill in ``batch.rewards``, from the first verifier, and ``batch.reward_parts``, from each. Returns prompt,
    answer, verifier and failure of each verdict that was not reached. Every rank must call this."""
    mine = range(dist.get_rank(), len(batch), dist.get_world_size())
    verdicts = verifiers.score(
        [(batch.responses[row], batch.answers[row]) for row in mine], [batch.rows[row] for row in mine if batch.rows]
    )
    found = [(name, row, verdict) for name in verdicts for row, verdict in zip(mine, verdicts[name], strict=True)]
    batch.reward_parts = {name: torch.zeros(len(batch)) for name in verifiers.names}
    failures = []
    for name, row, verdict in parallel.all_gather_objects(found):
        batch.reward_parts[name][row] = verdict.reward
        if verdict.failure:
            about = {"prompt": batch.prompts[row], "answer": batch.answers[row]}
            failures.append({**about, "verifier": name, "failure": verdict.failure})
    batch.rewards = batch.reward_parts[verifiers.names[0]]
    return failures
