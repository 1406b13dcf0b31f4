"""The training loop of the native engine: a step reads as the method."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from echorl_nemo.data.prompts import Prompt, PromptData
from echorl_nemo.echo import segment_steps, select_clips
from echorl_nemo.engines.megatron.config import RunConfig
from echorl_nemo.engines.megatron.parallel import Parallel
from echorl_nemo.engines.megatron.policy import MegatronPolicy
from echorl_nemo.grpo import group_advantages
from echorl_nemo.rewards import Reward
from echorl_nemo.rollout.batch import RolloutBatch
from echorl_nemo.rollout.engine import RolloutEngine

EVALUATION_SEED_OFFSET = 1 << 32
"""Evaluation draws other random numbers than training, the same ones each time."""


@dataclass
class Trainer:
    """Ties policy, rollout engine and reward together. Every rank calls every method with the same arguments."""

    config: RunConfig
    policy: MegatronPolicy
    rollout: RolloutEngine
    reward: Reward
    train_data: PromptData
    eval_data: PromptData | None
    boundary_ids: tuple[int, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each phase of the latest step."""

    @property
    def parallel(self) -> Parallel:
        return self.policy.parallel

    def step(self, step: int) -> tuple[dict[str, float], RolloutBatch, Tensor]:
        """One training step; returns its metrics, the batch as trained on, and its step ids [N, S]."""
        start = time.perf_counter()
        prompts = self.train_data.step(step, self.config.trainer.prompts_per_step, seed=self.config.trainer.seed)
        batch = self.roll_out(prompts)
        step_ids = segment_steps(batch.tokens, batch.response_mask, self.boundary_ids)
        metrics = batch_metrics(batch, self.config.echorl.success_reward) | self.annotate(batch, step_ids)
        with self._timed("update"):
            metrics |= self.policy.update(batch)
            self.rollout.update_weights()
        elapsed = time.perf_counter() - start
        metrics |= {f"time.{phase}": seconds for phase, seconds in self.seconds.items()}
        metrics |= {"time.step": elapsed, "tokens_per_second": float(batch.response_mask.sum()) / elapsed}
        return metrics, batch, step_ids

    def roll_out(self, prompts: list[Prompt]) -> RolloutBatch:
        """Rollouts of ``prompts``, verified, with advantages."""
        with self._timed("generate"):
            batch = self.rollout.generate(prompts, self.config.rollout.group_size, seed=self.config.trainer.seed)
        with self._timed("verify"):
            batch.rewards = self.verify(batch)
        batch.advantages = group_advantages(batch.rewards, batch.group_ids, estimator=self.config.algo.estimator)
        return batch

    def annotate(self, batch: RolloutBatch, step_ids: Tensor) -> dict[str, float]:
        """Fill in old log-probs, entropies (one pass, both from the same logits) and EchoClips; their metrics."""
        echorl = self.config.echorl
        with self._timed("score"):
            batch.old_logprobs, entropies = self.policy.score(batch)
        metrics = agreement(batch, entropies)
        if echorl.entropy_source == "policy":
            batch.entropies = entropies
        if not echorl.enabled:
            return metrics
        assert batch.entropies is not None and batch.rewards is not None
        selection = select_clips(
            batch.entropies,
            step_ids,
            rewards=batch.rewards,
            finished=batch.finished,
            group_ids=batch.group_ids,
            config=echorl,
        )
        batch.clip_mask = selection.mask
        return metrics | {f"echorl.{name}": value for name, value in selection.stats.items()}

    def verify(self, batch: RolloutBatch) -> Tensor:
        """Rewards, [N] float32; the ranks of the run share the work."""
        rank = torch.distributed.get_rank()
        world = torch.distributed.get_world_size()
        mine = [(row, self.reward(batch.responses[row], batch.answers[row])) for row in range(rank, len(batch), world)]
        rewards = torch.zeros(len(batch))
        for row, reward in self.parallel.share_objects(mine):
            rewards[row] = reward
        return rewards

    def evaluate(self) -> dict[str, float]:
        """Sampled accuracy on the held-out prompts; empty if there are none."""
        if self.eval_data is None:
            return {}
        batch = self.rollout.generate(
            self.eval_data.all(),
            self.config.trainer.eval_group_size,
            seed=self.config.trainer.seed + EVALUATION_SEED_OFFSET,
        )
        success = (self.verify(batch) >= self.config.echorl.success_reward) & batch.finished
        return {
            "eval.accuracy": float(success.float().mean()),
            "eval.response_length": float(batch.response_lengths.float().mean()),
            "eval.truncated": float((~batch.finished).float().mean()),
        }

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def batch_metrics(batch: RolloutBatch, success_reward: float) -> dict[str, float]:
    """What the rollouts themselves tell. `all_one` and `all_zero`: the share of groups in which every rollout, or
    none, is rewarded as a success; the policy gradient learns from the others alone."""
    assert batch.rewards is not None
    _, index, sizes = batch.group_ids.unique(return_inverse=True, return_counts=True)
    success = batch.rewards >= success_reward
    successes = torch.zeros_like(sizes).scatter_add_(0, index, success.long())
    return {
        "reward": float(batch.rewards.mean()),
        "all_one": float((successes == sizes).float().mean()),
        "all_zero": float((successes == 0).float().mean()),
        "truncated": float((~batch.finished).float().mean()),
        "response_length": float(batch.response_lengths.float().mean()),
    }


def agreement(batch: RolloutBatch, scored_entropies: Tensor) -> dict[str, float]:
    """How far the rollout engine's numbers lie from the policy's scoring pass, over response tokens: mean absolute
    difference of log-probs, largest absolute difference of entropies (nats)."""
    gaps = {}
    mask = batch.response_mask
    if batch.rollout_logprobs is not None and batch.old_logprobs is not None:
        difference = (batch.rollout_logprobs - batch.old_logprobs).abs()[mask]
        gaps["rollout.logprob_gap"] = float(difference.mean()) if len(difference) else 0.0
    if batch.entropies is not None:
        difference = (batch.entropies - scored_entropies).abs()[mask]
        gaps["rollout.entropy_gap"] = float(difference.max()) if len(difference) else 0.0
    return gaps
