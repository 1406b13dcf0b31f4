"""The training step of the native engine: generate, verify, score, select EchoClips, update."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.echo import clip_coefficient, count_steps_before, segment_steps, select_clips
from echorl_nemo.echo.config import needs_steps_before
from echorl_nemo.echo.rows import Rows
from echorl_nemo.engines.megatron.columns import Columns, gather_columns, join_columns
from echorl_nemo.engines.megatron.demonstrations import mark_hints, with_experts, with_hints
from echorl_nemo.engines.megatron.parallel import Parallel
from echorl_nemo.engines.megatron.policy import MegatronPolicy
from echorl_nemo.engines.megatron.verify import verify_rollouts
from echorl_nemo.grpo import (
    all_success_groups,
    counted_rollouts,
    effective_groups,
    kl_estimate,
    overlong_penalty,
    step_advantages,
)
from echorl_nemo.grpo.degenerate import FIRST_COLLAPSE_THRESHOLD, collapse_rate, next_collapse_threshold
from echorl_nemo.resilience.watchdog import Watchdog
from echorl_nemo.rewards import TIMED_OUT, VerifierPool
from echorl_nemo.rollout.batch import RolloutBatch, concatenate, rows_of_groups
from echorl_nemo.rollout.engine import RolloutEngine
from echorl_nemo.rollout.restart import RestartingEngine
from echorl_nemo.schema import RunConfig

EVALUATION_SEED_OFFSET = 1 << 32
"""Evaluation draws other random numbers than training, the same ones each time."""


@dataclass
class StepResult:
    """The result of a training step."""

    metrics: dict[str, float]
    batch: RolloutBatch
    """The rollouts of this rank that the policy was trained on."""
    skipped: str
    """What was not finite, so that all or some of the mini-batches were not learnt from; empty if all were."""


@dataclass
class Trainer:
    """Runs training steps with a policy, a rollout engine and verifiers. Every rank must call each method. A batch that
    a method takes or returns holds the rollouts of this rank; metrics are those of all ranks."""

    config: RunConfig
    policy: MegatronPolicy
    rollout: RolloutEngine
    verifiers: VerifierPool
    """The verifier that decides success first, then those that add to the reward."""
    tokenizer: Tokenizer
    train_data: PromptData
    eval_data: PromptData | None
    boundary_ids: tuple[int, ...]
    watchdog: Watchdog
    failures: list[dict[str, str]] = field(default_factory=list)
    """On the main rank the verdicts that were not reached in the latest step, each with prompt, answer, verifier and
    failure."""
    steps_done: int = 0
    """Training steps completed so far, by which `echorl.coef_schedule` goes."""
    fork_threshold: float | None = None
    """Nats: the threshold of the next step's fork tokens, with `echorl.fork_threshold=running`."""
    collapse_threshold: float = FIRST_COLLAPSE_THRESHOLD
    """Share of groups with equal rewards above which AVSPO acts (`algo.degenerate=avspo`)."""
    earlier_reward: float | None = None
    """Mean reward of the step before, by which that share is adapted; None before the first."""
    position: int = 0
    """Number of prompts used so far, from which a resumed run goes on."""
    generated: int = 0
    """Response tokens that the latest step generated, also in rollouts that it did not keep."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each phase of the latest step, seconds."""

    @property
    def parallel(self) -> Parallel:
        return self.policy.parallel

    def step(self) -> StepResult:
        """Run one training step."""
        start = time.perf_counter()
        self.seconds = dict.fromkeys(("generate", "verify", "score", "update"), 0.0)
        self.failures = []
        self.generated = 0
        batch, metrics = self.roll_out()
        metrics |= self._count_failures()
        step_ids = segment_steps(batch.tokens, batch.response_mask, self.boundary_ids)
        with self._timed("score"):
            metrics |= self.score(batch)
        skipped = self._nonfinite(batch, SCORED)
        if not skipped:
            self.estimate_advantages(batch)
            skipped = self._nonfinite(batch, ("advantages",))
        if not skipped:
            metrics |= self.select_clips(batch, step_ids)
            with self._timed("update"):
                update = self.policy.update(batch, clip_coef=metrics.get("echorl.coef"))
                metrics |= update.metrics
                skipped = "; ".join(update.refused)
                self.rollout.update_weights(self.policy)
        self.steps_done += 1
        elapsed = time.perf_counter() - start
        metrics |= {f"time.{phase}": seconds for phase, seconds in self.seconds.items()}
        metrics |= {
            "time.step": elapsed,
            "tokens_per_second": self.generated / elapsed,
        }
        if self.parallel.device.type == "cuda":
            metrics["memory.peak"] = torch.cuda.max_memory_allocated() / (1 << 30)
        if isinstance(self.rollout, RestartingEngine):
            metrics["rollout.restarts"] = float(self.rollout.restarts)
        return StepResult(metrics, batch, skipped)

    def close(self) -> None:
        """End the verifiers' processes and the rollout engine."""
        self.verifiers.close()
        self.rollout.close()

    def roll_out(self) -> tuple[RolloutBatch, dict[str, float]]:
        """Generate and verify the rollouts of a step; return them with their metrics.

        With dynamic sampling further prompts are used until `prompts_per_step` groups have different rewards.
        All-success groups are kept for their EchoClips.
        """
        algo, wanted = self.config.algo, self.config.trainer.prompts_per_step
        rounds = algo.dynamic_sampling_rounds if algo.dynamic_sampling else 1
        asked: list[RolloutBatch] = []
        seen: list[Columns] = []
        self.rollout.wake()
        while True:
            asked.append(self._ask(wanted))
            seen.append(gather_columns(asked[-1], self.parallel.rows_group))
            columns = join_columns(seen)
            effective = effective_groups(columns.rewards, columns.group_ids)
            count = len(columns.group_ids[effective].unique())
            if count >= wanted or len(asked) >= rounds:
                break
        self.rollout.sleep()
        batch, success = concatenate(asked), self.config.echorl.success_reward
        metrics = batch_metrics(columns.select(columns.sampled), success)
        if not algo.dynamic_sampling:
            return batch, metrics
        kept = _first_groups(columns.group_ids, effective, wanted)
        if self.config.echorl.enabled:
            kept |= all_success_groups(own_rewards(columns, success), columns.group_ids, success)
        if not kept.any():  # keep one group, so that the run goes on with a step that changes nothing
            kept |= columns.group_ids == columns.group_ids[0]
        metrics |= {"sampling.rounds": float(len(asked)), "sampling.effective_groups": float(min(count, wanted))}
        groups = list(dict.fromkeys(columns.group_ids[kept].tolist()))
        batch = batch.select(rows_of_groups(batch, groups))
        if self.parallel.data_size > 1:  # each rank trains on as many groups
            batch = self.parallel.exchange_rollouts(batch if self.parallel.context_rank == 0 else None, groups)
        return batch, metrics

    def _ask(self, count: int) -> RolloutBatch:
        """Generate and verify rollouts of the next ``count`` prompts; return those of this rank's part of them."""
        seed, algo = self.config.trainer.seed, self.config.algo
        prompts = self.train_data.sequence(self.position, count, seed=seed)
        self.position += count
        if algo.demonstrations == "uft":
            prompts = with_hints(prompts, self.tokenizer, algo, step=self.steps_done, seed=seed)
        with self._timed("generate"):
            batch = self.rollout.generate(prompts, self.config.rollout.group_size, seed=seed)
        self.generated += int(self.parallel.sum_over_data([float(batch.response_mask.sum())])[0])
        prompts = [prompts[i] for i in self.parallel.data_shard(count)]
        if algo.demonstrations == "uft":
            mark_hints(batch, prompts, self.tokenizer)
        elif algo.demonstrations == "luffy":
            batch = with_experts(batch, prompts, self.tokenizer)
        with self._timed("verify"):
            self.failures += verify_rollouts(batch, self.verifiers, self.parallel)
        return batch

    def score(self, batch: RolloutBatch) -> dict[str, float]:
        """Fill in old log-probs and entropies, both from the same logits, and with a KL the reference policy's
        log-probs. Returns the differences between the rollout engine's numbers and the policy's.

        With `algo.importance=rollout` the engine's numbers are used, and the policy scores only a sample to compare.
        """
        if self.config.algo.importance == "rollout":
            if batch.rollout_logprobs is None:
                raise RuntimeError(
                    "algo.importance=rollout: the rollout engine returned no log-probs of the sampled tokens (a "
                    "TensorRT-LLM without logprobs_simple_format does not); use importance=policy"
                )
            batch.old_logprobs = batch.rollout_logprobs
            gaps = self._compare_sample(batch)
        else:
            batch.old_logprobs, entropies = self.policy.score(batch)
            gaps = self._engine_gaps(batch, batch.old_logprobs, entropies)
            if batch.expert is not None and batch.rollout_logprobs is not None:  # no engine sampled these
                batch.rollout_logprobs = torch.where(batch.sampled[:, None], batch.rollout_logprobs, batch.old_logprobs)
            if self.config.echorl.entropy_source == "policy":
                batch.entropies = entropies
        if self.config.algo.kl_coef:
            batch.reference_logprobs = self.policy.score_reference(batch)
        return gaps

    def _compare_sample(self, batch: RolloutBatch) -> dict[str, float]:
        """The differences between the engine's numbers and the policy's on a sample, `rollout.check_share` of the
        rollouts."""
        share = self.config.rollout.check_share
        if not share:
            return {}
        rows = Rows(len(batch), torch.device("cpu"), self.parallel.rows_group)
        rollouts = len(rows.gather(batch.finished))
        chosen = torch.linspace(0, rollouts - 1, max(1, round(share * rollouts))).round().long()
        sample = batch.select(chosen[(chosen >= rows.own.start) & (chosen < rows.own.stop)] - rows.own.start)
        return self._engine_gaps(sample, *self.policy.score(sample))

    def estimate_advantages(self, batch: RolloutBatch) -> None:
        """Fill in the advantages, and which rollouts count in the loss. Rewards are shaped first: by further verifiers,
        response length and KL, as configured."""
        algo = self.config.algo
        assert batch.rewards is not None
        shaped = batch.rewards - overlong_penalty(batch.response_lengths, self.config.rollout.max_new_tokens, algo)
        for extra in self.config.data.extra_rewards:
            shaped = shaped + extra.weight * batch.reward_parts[extra.name]
        if algo.kl_coef and algo.kl_in == "reward":
            assert batch.old_logprobs is not None and batch.reference_logprobs is not None
            kl = kl_estimate(batch.old_logprobs, batch.reference_logprobs, estimator=algo.kl_estimator)
            shaped = shaped - algo.kl_coef * torch.where(batch.response_mask, kl, 0.0).sum(dim=1)
        success_reward = self.config.echorl.success_reward
        rows = Rows(len(batch), torch.device("cpu"), self.parallel.rows_group)
        shaped, group_ids = rows.gather(shaped), rows.gather(batch.group_ids)
        if algo.degenerate == "avspo":
            reward, rate = float(shaped.double().mean()), collapse_rate(shaped, group_ids)
            threshold = next_collapse_threshold(self.collapse_threshold, rate, reward, self.earlier_reward)
            self.collapse_threshold, self.earlier_reward = threshold, reward
        batch.advantages = step_advantages(
            shaped,
            group_ids,
            algo,
            correct=rows.gather(batch.rewards >= success_reward),
            success_reward=success_reward,
            entropies=batch.entropies,
            response_mask=batch.response_mask,
            collapse_threshold=self.collapse_threshold,
            rows=rows.own,
            data_group=self.parallel.rows_group,
        )
        if algo.anchor != "none":
            batch.mastered = all_success_groups(own_rewards(batch, success_reward), batch.group_ids, success_reward)
        batch.counted = counted_rollouts(batch.advantages, batch.group_ids, batch.finished, algo)

    def select_clips(self, batch: RolloutBatch, step_ids: Tensor) -> dict[str, float]:
        """Fill in the EchoClips of the verified successes. Returns their statistics and the weight of the clip loss."""
        echorl = self.config.echorl
        if not echorl.enabled:
            return {}
        assert batch.entropies is not None and batch.rewards is not None
        before = None
        if needs_steps_before(echorl):
            before = count_steps_before(batch.tokens, batch.response_mask, self.boundary_ids)
        selection = select_clips(
            batch.entropies,
            step_ids,
            rewards=own_rewards(batch, echorl.success_reward),
            finished=batch.finished & batch.sampled,
            group_ids=batch.group_ids,
            config=echorl,
            data_group=self.parallel.rows_group,
            steps_before=before,
            threshold=self.fork_threshold,
        )
        batch.clip_weight = selection.weight
        self.fork_threshold = selection.next_threshold
        inside = batch.entropies[batch.response_mask].double()
        total, tokens = self.parallel.sum_over_data([float(inside.sum()), float(len(inside))])
        entropy = total / tokens if tokens else 0.0
        statistics = {f"echorl.{name}": value for name, value in selection.stats.items()}
        return {**statistics, "echorl.coef": clip_coefficient(echorl, step=self.steps_done, entropy=entropy)}

    def evaluate(self) -> dict[str, float]:
        """Accuracy and response lengths on the held-out prompts, as metrics; empty if there are no such prompts."""
        if self.eval_data is None:
            return {}
        self.watchdog.heartbeat("evaluate")
        self.rollout.wake()
        batch = self.rollout.generate(
            self.eval_data.all(),
            self.config.trainer.eval_group_size,
            seed=self.config.trainer.seed + EVALUATION_SEED_OFFSET,
            temperature=self.config.trainer.eval_temperature,
        )
        self.rollout.sleep()
        missed = verify_rollouts(batch, self.verifiers, self.parallel)
        self.failures += self.parallel.gather_objects_on_main(missed)
        columns = gather_columns(batch, self.parallel.rows_group)
        success = (columns.rewards >= self.config.echorl.success_reward) & columns.finished
        return {
            "eval.accuracy": float(success.float().mean()),
            "eval.response_length": float(columns.response_lengths.float().mean()),
            "eval.truncated": float((~columns.finished).float().mean()),
        }

    def _count_failures(self) -> dict[str, float]:
        """Metrics of the step's verdicts that were not reached, which are then collected on the main rank."""
        timeouts = sum(failure["failure"].startswith(TIMED_OUT) for failure in self.failures)
        failed, late = self.parallel.sum_over_data([float(len(self.failures)), float(timeouts)])
        self.failures = self.parallel.gather_objects_on_main(self.failures)
        return {"verify.failures": failed, "verify.timeouts": late}

    def _nonfinite(self, batch: RolloutBatch, names: Sequence[str]) -> str:
        """`nonfinite_values` of the first rank that has some, the same on every rank."""
        first = Rows(len(batch), torch.device("cpu"), self.parallel.rows_group).own.start
        found = self.parallel.all_gather_objects([nonfinite_values(batch, names, first_row=first)])
        return next((sentence for sentence in found if sentence), "")

    def _engine_gaps(self, batch: RolloutBatch, scored_logprobs: Tensor, scored_entropies: Tensor) -> dict[str, float]:
        """Differences between the rollout engine's numbers and the policy's scoring pass, over response tokens: the
        mean absolute difference of log-probs and the largest absolute difference of entropies, nats."""
        gaps = {}
        mask = batch.response_mask & batch.sampled[:, None]
        if batch.rollout_logprobs is not None:
            difference = (batch.rollout_logprobs - scored_logprobs).abs()[mask].double()
            total, count = self.parallel.sum_over_data([float(difference.sum()), float(len(difference))])
            gaps["rollout.logprob_gap"] = total / count if count else 0.0
        if batch.entropies is not None:
            difference = (batch.entropies - scored_entropies).abs()[mask]
            largest = torch.tensor([float(difference.max()) if len(difference) else 0.0])
            largest = Rows(1, torch.device("cpu"), self.parallel.rows_group).gather(largest)
            gaps["rollout.entropy_gap"] = float(largest.max())
        return gaps

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.watchdog.heartbeat(phase)
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def own_rewards(batch: RolloutBatch | Columns, success_reward: float) -> Tensor:
    """[N]: the rewards, with ``success_reward`` for an expert's response, so that it does not decide whether a group
    is all-correct."""
    assert batch.rewards is not None
    return torch.where(batch.sampled, batch.rewards, success_reward)


SCORED = ("rewards", "old_logprobs", "entropies", "reference_logprobs")
"""Columns of a batch from which its advantages are estimated."""


def nonfinite_values(batch: RolloutBatch, names: Sequence[str], *, first_row: int) -> str:
    """A sentence about the first of the columns ``names`` of ``batch`` whose numbers are not all finite; empty if all
    are. ``first_row``: the number of the batch's first row among the rollouts of all ranks."""
    for name in names:
        values = getattr(batch, name)
        if values is None:
            continue
        wrong = ~values.isfinite() if values.dim() == 1 else (~values.isfinite() & batch.response_mask).any(dim=1)
        if bool(wrong.any()):
            row = first_row + int(wrong.nonzero()[0])
            return f"{name} of {int(wrong.sum())} rollouts are not finite, the first in row {row}"
    return ""


def _first_groups(group_ids: Tensor, wanted: Tensor, count: int) -> Tensor:
    """[N] bool: the rollouts of the first ``count`` groups, in the batch's order, among those in ``wanted`` [N]
    bool."""
    groups = list(dict.fromkeys(group_ids[wanted].tolist()))[:count]
    return torch.isin(group_ids, torch.tensor(groups, dtype=group_ids.dtype))


def batch_metrics(batch: Columns, success_reward: float) -> dict[str, float]:
    """Metrics of the rollouts of a step. `all_one` and `all_zero` are the shares of groups in which every rollout, or
    none, is a success; the policy gradient learns only from the other groups."""
    _, index, sizes = batch.group_ids.unique(return_inverse=True, return_counts=True)
    success = batch.rewards >= success_reward
    successes = torch.zeros_like(sizes).scatter_add_(0, index, success.long())
    return {
        "reward": float(batch.rewards.mean()),
        "all_one": float((successes == sizes).float().mean()),
        "all_zero": float((successes == 0).float().mean()),
        "truncated": float((~batch.finished).float().mean()),
        "response_length": float(batch.response_lengths.float().mean()),
        **{f"reward.{name}": float(part.mean()) for name, part in batch.reward_parts.items()},
    }
