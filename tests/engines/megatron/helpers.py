"""A native engine on the tiny task, on ranks that a test started."""

import os
from contextlib import ExitStack
from typing import Any

import torch

from echorl_nemo.checks.commands import checked_inputs
from echorl_nemo.config import load_config, to_yaml
from echorl_nemo.echo import segment_steps
from echorl_nemo.engines.megatron.layout import ranks_per_replica
from echorl_nemo.engines.megatron.platform import detect_platform
from echorl_nemo.engines.megatron.run import silence_library_warnings
from echorl_nemo.resilience.stop import StopSignals
from echorl_nemo.resilience.watchdog import Watchdog
from echorl_nemo.rollout.batch import RolloutBatch, concatenate, rows_of_groups
from echorl_nemo.schema import RunConfig

silence_library_warnings()
PLATFORM = detect_platform("cpu")

from echorl_nemo.engines.megatron.trainer import Trainer  # noqa: E402
from echorl_nemo.engines.megatron.worker import build_trainer, initialize_parallel, run_rank  # noqa: E402

LAYOUTS = {
    "TP1": [],
    "TP2": ["parallel.tensor=2"],
    "PP2": ["parallel.pipeline=2"],
    "TP2xPP2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "DP2": ["parallel.data=2"],
    "TP2+SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "TP2xPP2+SP": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"],
    "CP2": ["parallel.context=2"],
    "TP2xCP2": ["parallel.tensor=2", "parallel.context=2"],
    "TP2xCP2+SP": ["parallel.tensor=2", "parallel.context=2", "parallel.sequence=true"],
    "PP2xCP2": ["parallel.pipeline=2", "parallel.context=2"],
    "CP2xDP2": ["parallel.context=2", "parallel.data=2"],
}
"""Overrides of each parallel layout that is tested."""

GROUP_SIZE = 4


def tiny_config(*overrides: str) -> RunConfig:
    """The quickstart, small: 4 groups of 4, one optimizer step on all."""
    os.environ.pop("RANK", None)
    return load_config(
        "quickstart",
        [
            "parallel=single",
            "trainer.run_dir=/nonexistent/run",
            "trainer.prompts_per_step=4",
            "trainer.minibatch_prompts=4",
            "trainer.micro_batch_size=4",
            f"rollout.group_size={GROUP_SIZE}",
            *overrides,
        ],
        schema=RunConfig,
    )


def trainer_of(config: RunConfig) -> Trainer:
    """On a rank: the trainer of ``config``."""
    config.parallel.data = torch.distributed.get_world_size() // ranks_per_replica(config.parallel)
    watchdog = Watchdog(None, torch.distributed.get_rank(), limit_seconds=0)
    return build_trainer(config, checked_inputs(config), PLATFORM, initialize_parallel(config, PLATFORM), watchdog)


def run_to_end(config: RunConfig, signals: StopSignals | None = None) -> int:
    """On a rank: what `echorl-nemo train` does there; returns the exit code."""
    with ExitStack() as closers:
        signals = signals or StopSignals().listen()
        return run_rank(config, to_yaml(config), checked_inputs(config), PLATFORM, signals, closers)


def example_batch(newline: int, eos: int, rewards: list[list[float]] | None = None, *, seed: int = 11) -> RolloutBatch:
    """4 groups of 4 random rollouts of many lengths: an all-success group, a mixed one, one without success, and one
    with a truncated success. Two data-parallel ranks get 6 clips and 1."""
    generator = torch.Generator().manual_seed(seed)
    rewards = rewards or [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    prompt_lengths = torch.tensor([5, 9, 7, 13]).repeat_interleave(4)
    response_lengths = torch.randint(2, 22, (16,), generator=generator)
    lengths = prompt_lengths + response_lengths
    positions = torch.arange(int(lengths.max())).expand(16, -1)
    response = (positions >= prompt_lengths[:, None]) & (positions < lengths[:, None])
    tokens = torch.randint(3, 33, positions.shape, generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = newline
    tokens[torch.arange(16), lengths - 1] = eos
    tokens[positions >= lengths[:, None]] = 0
    finished = torch.ones(16, dtype=torch.bool)
    finished[13] = False
    flat = torch.tensor(rewards).flatten().float()
    return RolloutBatch(
        tokens=tokens,
        response_mask=response,
        lengths=lengths,
        finished=finished,
        group_ids=torch.arange(4).repeat_interleave(4),
        rewards=flat,
    )


def prepared_batch(trainer: Trainer, **options: Any) -> tuple[RolloutBatch, dict[str, float]]:
    """This rank's part of the example, scored and with its clips, as `Trainer.step` makes it; and what that
    reported."""
    (newline,) = trainer.boundary_ids
    batch = own_part(trainer, example_batch(newline, eos=1, **options))
    trainer.score(batch)
    batch.rollout_logprobs = batch.old_logprobs
    trainer.estimate_advantages(batch)
    step_ids = segment_steps(batch.tokens, batch.response_mask, trainer.boundary_ids)
    return batch, trainer.select_clips(batch, step_ids)


def own_part(trainer: Trainer, batch: RolloutBatch) -> RolloutBatch:
    """The rollouts of the groups that this rank trains on, of a batch that every rank has."""
    groups = list(dict.fromkeys(batch.group_ids.tolist()))
    return batch.select(rows_of_groups(batch, [groups[i] for i in trainer.parallel.data_shard(len(groups))]))


def whole(trainer: Trainer, batch: RolloutBatch) -> RolloutBatch:
    """The rollouts of all ranks, on every rank."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (trainer.parallel.data_rank, batch))
    return concatenate([part for _, part in sorted(dict(parts).items())])


def off_policy(batch: RolloutBatch) -> RolloutBatch:
    """As if some updates had passed since: ratios on both sides of the clip. The same whoever holds a rollout of the
    example."""
    assert batch.old_logprobs is not None
    noise = torch.randn(4, 4, 48, generator=torch.Generator().manual_seed(5))  # groups, members, positions
    own = noise[batch.group_ids.unique()].flatten(0, 1)[:, : batch.tokens.shape[1]]
    batch.old_logprobs = batch.old_logprobs + 0.3 * own * batch.response_mask
    return batch
