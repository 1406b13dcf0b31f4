"""The GRPO trainer: NeMo-Aligner's REINFORCE loop with group advantages and EchoClips.

Shapes: B rollouts of a step over all replicas, S positions; token tensors are [B, S - 1], see `actor`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from nemo_aligner.algorithms.reinforce import ReinforceTrainer, compute_num_rollout_microbatches
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.parallel_state import trt_llm_reshard_region
from nemo_aligner.utils.utils import cpu_dict
from torch import Tensor

from echorl_nemo.echo import (
    EchoRLConfig,
    boundary_ids,
    clip_coefficient,
    count_steps_before,
    segment_steps,
    select_clips,
)
from echorl_nemo.echo.config import needs_steps_before
from echorl_nemo.echo.rows import Rows
from echorl_nemo.engines.nemo_aligner.batch import GRPORolloutBatch, pad_to_multiple, response_mask
from echorl_nemo.grpo import counted_rollouts, kl_estimate, overlong_penalty, step_advantages
from echorl_nemo.grpo.degenerate import FIRST_COLLAPSE_THRESHOLD


class EchoGRPOTrainer(ReinforceTrainer):
    """NeMo-Aligner's REINFORCE trainer with group advantages and EchoClips. `cfg` is the section `trainer.grpo`; the
    model must be a `MegatronGPTEchoGRPOActorModel`."""

    def __init__(self, *args: Any, reward_weights: tuple[float, ...] = (), **kwargs: Any) -> None:
        """``reward_weights``: weights of the reward's further columns; the first column decides success."""
        super().__init__(*args, **kwargs)
        self.algo, self.echorl = self.model.algo, self.model.echorl
        self.reward_weights = reward_weights
        self.model.rollouts_per_prompt = self.cfg.num_rollouts_per_prompt
        self.boundary_ids = boundary_ids(_vocabulary(self.model.tokenizer), self.echorl.boundary)
        self.compute_init_policy_kl = self.algo.kl_coef > 0

    @torch.no_grad()
    def generate_rollouts(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
        """Generate the rollouts of a step. Returns this replica's share, metrics of the whole step, and seconds of each
        phase.

        `consumed_samples` counts the prompts of a step. Upstream counts its rollouts, and so skips prompts.
        """
        with self.timer("prepare_for_inference"):
            self.model.prepare_for_inference()
        batch, metrics = self._run_inference(self.train_dataloader_builder, self.consumed_samples, is_validation=False)
        self.consumed_samples += self.model.cfg.grpo.num_rollout_samples
        data, clip_metrics = self.generate_reinforce_data(batch)
        with self.timer("finish_inference"):
            self.model.finish_inference()
        metrics = metrics | clip_metrics | {"consumed_samples": self.consumed_samples}
        return data, metrics, self.timer.consume_durations()

    def _run_inference(
        self, dataloader_builder: Callable[..., Any], consumed_samples: int, is_validation: bool
    ) -> tuple[GRPORolloutBatch, dict[str, Any]]:
        """Generate the rollouts of a step with their rewards. Returns them, the same on every replica, and their
        metrics."""
        # with TensorRT-LLM's resharding pipeline stages generate as further replicas, so that all tensors of a rollout
        # must be gathered in the same context
        reshard = trt_llm_reshard_region if self.trtllm_reshard else nullcontext
        with reshard():
            dataloader = dataloader_builder(consumed_samples=consumed_samples)
            with self.timer("batch_iterator_init"):
                batches = self.batch_iterator_cls(
                    iter(dataloader.batch_sampler),
                    compute_num_rollout_microbatches(dataloader),
                    dataloader.dataset,
                    self.collate_fn,
                )
            with self.timer("generate"):
                asked = 1 if is_validation else self.cfg.num_rollouts_per_prompt
                rollouts, pending = self._generate(batches, asked)
            with self.timer("critic_wait"):
                for rollout, future in zip(rollouts, pending, strict=True):
                    # by column: upstream pads tensors of two dimensions to the sequence length
                    rollout |= {f"reward.{i}": part for i, part in enumerate(future.result().unbind(dim=1))}
            batch = GRPORolloutBatch.from_rollout_batches(
                rollouts,
                eos_id=self.model.tokenizer.eos_id,
                rollout_batch_seq_length=self.cfg.rollout_batch_seq_length,
            ).gather_and_balance_globally()
        batch["rewards"] = batch["reward.0"]
        batch["is_end"] = batch["is_end"].bool()
        metrics = self.compute_rollout_metrics(batch) | _group_metrics(batch, self.echorl)
        return batch.sorted_by_group(), cpu_dict(metrics)

    def _generate(self, batches: Any, rollouts_per_prompt: int) -> tuple[list[dict[str, Tensor]], list[Any]]:
        rollouts, pending = [], []
        for prompts in batches:
            for _ in range(rollouts_per_prompt):
                rollout = self.model.infer(prompts)
                pending.append(self.rm.infer_rm({**rollout, "answers": prompts["answers"]}))
                rollout["group_ids"] = prompts["group_ids"].to(rollout["prompt_lengths"].device)
                rollout["is_end"] = rollout["is_end"].to(torch.uint8)  # gathered by a sum
                rollouts.append(rollout)
        return rollouts, pending

    def generate_reinforce_data(self, rollout_batch: GRPORolloutBatch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Score this replica's share of the rollouts of a step, estimate advantages and select EchoClips. Returns the
        share, as `get_loss_and_metrics` takes it, and the statistics of the clips."""
        whole = rollout_batch
        if self.model.cfg.get("sequence_parallel", False):
            ranks, eos_id = self.model.cfg.tensor_model_parallel_size, self.model.tokenizer.eos_id
            whole["response_tokens"] = pad_to_multiple(whole["response_tokens"], ranks, eos_id=eos_id)
        batch = self._share(whole)
        tokens = batch["response_tokens"]
        batch["mask"] = response_mask(batch["prompt_lengths"], batch["response_lengths"], tokens.shape[1])
        self._score(batch)
        rows = Rows(len(tokens), tokens.device, parallel_state.get_data_parallel_group())
        batch["advantages"] = step_advantages(
            rows.gather(self._shaped_rewards(batch)),
            whole["group_ids"],
            self.algo,
            correct=whole["rewards"] >= self.echorl.success_reward,
            success_reward=self.echorl.success_reward,
            entropies=batch["entropies"],
            response_mask=batch["mask"],
            collapse_threshold=FIRST_COLLAPSE_THRESHOLD,
            rows=rows.own,
            data_group=parallel_state.get_data_parallel_group(),
        )
        live = rows.gather((batch["advantages"] != 0).view(len(tokens), -1).any(dim=1))
        batch["counted"] = counted_rollouts(live, whole["group_ids"], whole["is_end"], self.algo)[rows.own]
        statistics = self._select_clips(batch)
        keys = ["response_tokens", "mask", "advantages", "counted", "old_logprobs", "clip_weight"]
        keys += ["init_logprobs"] if self.compute_init_policy_kl else []
        return {key: batch[key] for key in keys}, statistics

    def _share(self, batch: GRPORolloutBatch) -> GRPORolloutBatch:
        return batch.chunk(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())

    def _score(self, batch: GRPORolloutBatch) -> None:
        """Fill in what the policy and, with a KL, the reference policy give for this replica's share."""
        tokens = batch["response_tokens"]
        with self.timer("logprobs"):
            scored = dict(zip(("old_logprobs", "entropies"), self.model.score(tokens), strict=True))
        if self.compute_init_policy_kl:
            with self.timer("init_logprobs"):
                scored["init_logprobs"] = self.model.get_init_policy_logprobs(tokens)
        for name, values in scored.items():
            batch[name] = torch.where(batch["mask"], values, 0.0)

    def _shaped_rewards(self, batch: GRPORolloutBatch) -> Tensor:
        """[n]: the rewards of this replica's share from which advantages are estimated."""
        lengths = batch["response_lengths"] - batch["prompt_lengths"]
        budget = self.model.cfg.grpo.length_params.max_length
        shaped = batch["rewards"] - overlong_penalty(lengths, budget, self.algo)
        for number, weight in enumerate(self.reward_weights, 1):
            shaped = shaped + weight * batch[f"reward.{number}"]
        if self.compute_init_policy_kl and self.algo.kl_in == "reward":
            kl = kl_estimate(batch["old_logprobs"], batch["init_logprobs"], estimator=self.algo.kl_estimator)
            shaped = shaped - self.algo.kl_coef * torch.where(batch["mask"], kl, 0.0).sum(dim=1)
        return shaped

    def _select_clips(self, batch: GRPORolloutBatch) -> dict[str, float]:
        """Fill in the EchoClips of the verified successes. Returns their statistics and the weight of the clip loss."""
        mask, group = batch["mask"], parallel_state.get_data_parallel_group()
        batch["clip_weight"] = torch.zeros_like(batch["entropies"])
        if not self.echorl.enabled:
            return {}
        steps = (batch["response_tokens"][:, 1:], mask, self.boundary_ids)
        selection = select_clips(
            batch["entropies"],
            segment_steps(*steps),
            rewards=batch["rewards"],
            finished=batch["is_end"],
            group_ids=batch["group_ids"],
            config=self.echorl,
            data_group=group,
            steps_before=count_steps_before(*steps) if needs_steps_before(self.echorl) else None,
        )
        batch["clip_weight"] = selection.weight
        total = torch.stack([batch["entropies"].double().sum(), mask.sum().double()])
        torch.distributed.all_reduce(total, group=group)
        entropy = float(total[0] / total[1].clamp(min=1))
        self.model.clip_coef = clip_coefficient(self.echorl, step=self.step, entropy=entropy)
        statistics = {f"echorl.{name}": value for name, value in selection.stats.items()}
        return {**statistics, "echorl.coef": self.model.clip_coef}


def _group_metrics(batch: GRPORolloutBatch, echorl: EchoRLConfig) -> dict[str, float]:
    """`all_one` and `all_zero`: the shares of groups in which every rollout, or none, is a success."""
    _, index, sizes = batch["group_ids"].unique(return_inverse=True, return_counts=True)
    successes = torch.zeros_like(sizes).scatter_add_(0, index, (batch["rewards"] >= echorl.success_reward).long())
    return {
        "all_one": float((successes == sizes).float().mean()),
        "all_zero": float((successes == 0).float().mean()),
    }


class _IdsToText:
    """Gives a NeMo tokenizer that is not a Hugging Face one the methods that `boundary_ids` calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return int(self.tokenizer.vocab_size)

    def batch_decode(self, sequences: list[list[int]], **kwargs: Any) -> list[str]:
        return [self.tokenizer.ids_to_text(ids) for ids in sequences]


def _vocabulary(tokenizer: Any) -> Any:
    inner = getattr(tokenizer, "tokenizer", None)
    return inner if hasattr(inner, "batch_decode") else _IdsToText(tokenizer)
