"""The policy: a model with its optimizer, which scores rollouts and learns from them.

Shapes: N rollouts, S positions, v vocabulary columns of this tensor-parallel rank.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from echorl_nemo.echo import EchoRLConfig, clip_denominator, clip_loss
from echorl_nemo.echo.rows import Rows
from echorl_nemo.engines.megatron.model import PolicyModel
from echorl_nemo.engines.megatron.scorer import MegatronScorer, MicroBatch
from echorl_nemo.grpo import AlgoConfig, LossInputs, StepTotals, policy_loss
from echorl_nemo.rollout.batch import RolloutBatch, rows_of_groups
from echorl_nemo.schema import TrainerConfig

METRICS = (
    "loss",
    "policy_loss",
    "clip_loss",
    "anchor_loss",
    "hint_loss",
    "entropy",
    "ratio_clipped",
    "kl_old",
    "kl_reference",
    "mismatch_dropped",
)
"""Metrics of a micro-batch. Each adds up over micro-batches and replicas."""


@dataclass(frozen=True)
class StepCounts:
    """Denominators of one optimizer step."""

    totals: StepTotals
    clip: float
    """Z of the clip loss."""
    hint_tokens: float
    """Tokens of the hints, over which their NLL is averaged."""


@dataclass(frozen=True)
class UpdateResult:
    """Metrics of the optimizer steps of one training step, and the reasons for those that were not taken."""

    metrics: dict[str, float]
    """Means over the mini-batches whose numbers were finite, and `optimizer_steps`, the number of steps taken."""
    refused: list[str]
    """The reason for each optimizer step that was not taken."""


class NotFiniteError(Exception):
    """Loss or gradient norm are not finite, so that an optimizer step was not taken. Raised on every rank alike."""


class MegatronPolicy(MegatronScorer):
    """A Megatron-Core model with its optimizer."""

    def __init__(
        self,
        model: PolicyModel,
        *,
        algo: AlgoConfig,
        echorl: EchoRLConfig,
        trainer: TrainerConfig,
        temperature: float,
        optimizer_steps: int,
        vocab_size: int | None = None,
    ) -> None:
        """``optimizer_steps``: their number in the whole run, for the learning-rate schedule. ``vocab_size``: as in
        `MegatronScorer`."""
        super().__init__(
            model,
            temperature=temperature,
            micro_batch_size=trainer.micro_batch_size,
            vocab_size=vocab_size,
            pack_tokens=trainer.pack_tokens,
        )
        self.algo, self.echorl, self.trainer = algo, echorl, trainer
        self._reference: list[Tensor] | None = None  # weights in host memory; `score_reference` swaps them in
        if algo.kl_coef:
            self._reference = [weight.data.cpu().clone() for weight in model.module.parameters()]
        self.optimizer = get_megatron_optimizer(_optimizer_config(trainer, model.config), [model.ddp])
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=trainer.lr,
            min_lr=trainer.lr,
            lr_warmup_steps=trainer.warmup_steps,
            lr_decay_steps=max(optimizer_steps, trainer.warmup_steps + 1),
            lr_decay_style="constant",
            start_wd=trainer.weight_decay,
            end_wd=trainer.weight_decay,
            wd_incr_steps=max(1, optimizer_steps),
            wd_incr_style="constant",
            # a resumed run follows its configuration, not what its checkpoint was trained with
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self.scheduler.step(increment=1)  # the first optimizer step has the rate of a step, not 0
        model.config.grad_scale_func = self.optimizer.scale_loss
        model.config.finalize_model_grads_func = _finalize_without_rescaling

    def initialize_optimizer_state(self) -> None:
        """Create Adam's state before the first optimizer step, since Megatron cannot save an optimizer without one."""
        for optimizer in self.optimizer.chained_optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer.init_state_fn(optimizer.optimizer, optimizer.config)

    def restore_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        """Load the state of a checkpoint, and set this run's settings again: Megatron's parameter groups bring those
        that the checkpoint was trained with."""
        own = self.optimizer.param_groups[0]
        for group in _parameter_groups(optimizer):
            # Megatron-Core 0.19 finds the group of a checkpoint by its rates, and raises KeyError for other ones
            group |= {name: own.get(name) for name in ("max_lr", "min_lr")}
        self.optimizer.load_state_dict(optimizer)
        for group in self.optimizer.param_groups:
            group["max_lr"] = group["min_lr"] = self.trainer.lr
            group["betas"] = (self.trainer.adam_beta1, self.trainer.adam_beta2)
            group["eps"] = self.trainer.adam_eps
        self.scheduler.num_steps = 0  # load_state_dict adds the checkpoint's steps
        self.scheduler.load_state_dict(scheduler)

    def score_reference(self, batch: RolloutBatch) -> Tensor:
        """Log-probs of the response tokens under the reference policy, [N, S] float32 nats."""
        assert self._reference is not None
        weights = [weight.data for weight in self.model.module.parameters()]
        current = [weight.clone() for weight in weights]
        for weight, reference in zip(weights, self._reference, strict=True):
            weight.copy_(reference)
        logprobs, _ = self.score(batch)
        for weight, own in zip(weights, current, strict=True):
            weight.copy_(own)
        return logprobs

    @property
    def device_key(self) -> str:
        """See `WeightSource`."""
        device = self.parallel.device
        return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource`."""
        for name, weight in self.model.bridge.export_hf_weights([self.model.module], cpu=False, show_progress=False):
            yield name, weight.detach().contiguous()

    def update(self, batch: RolloutBatch, *, clip_coef: float | None = None) -> UpdateResult:
        """Take one optimizer step on each mini-batch of whole groups. ``batch``: this rank's rollouts; the groups of
        the step are those of all ranks, in their order. ``clip_coef``: the weight of the clip loss in this training
        step; `echorl.coef` if None.

        A step is not taken if loss or gradient norm are not finite, nor if the gradient is 0: then there is nothing to
        learn, and Adam's momentum and the weight decay would still change the weights.
        """
        rows = Rows(len(batch), torch.device("cpu"), self.parallel.rows_group)
        groups = list(dict.fromkeys(rows.gather(batch.group_ids).tolist()))
        count = self.trainer.prompts_per_step // self.trainer.minibatch_prompts
        coef = self.echorl.coef if clip_coef is None else clip_coef
        taken: list[dict[str, float]] = []
        refused: list[str] = []
        for n in range(count):
            if part := groups[n::count]:  # dynamic sampling may leave fewer groups than there are optimizer steps
                try:
                    taken.append(self._optimizer_step(batch, part, coef))
                except NotFiniteError as why:
                    refused.append(f"optimizer step {n + 1} of {count}: {why}")
        metrics = {name: sum(step[name] for step in taken) / len(taken) for name in (taken or [{}])[0]}
        metrics["optimizer_steps"] = float(sum(step["optimizer_steps"] for step in taken))
        return UpdateResult(metrics, refused)

    def _optimizer_step(self, batch: RolloutBatch, groups: list[int], clip_coef: float) -> dict[str, float]:
        batch = batch.select(rows_of_groups(batch, groups))
        counts = self._counts(batch)
        batch, rows, idle_row = self._filled(batch)
        micro_rows = self._micro_batches(batch, rows)
        micro_rows += self._idle_micro_batches(len(micro_rows), row=idle_row)

        self.model.ddp.train()
        self.model.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run(batch, micro_rows, self._loss_of_logits(counts, clip_coef), forward_only=False)
        metrics = self._sum_reports(reports)
        if not math.isfinite(metrics["loss"]):
            raise NotFiniteError(f"the loss is {metrics['loss']}")
        grad_norm = self._grad_norm()
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if grad_norm:
            self.optimizer.step()
            self.scheduler.step(increment=1)
        return {**metrics, "grad_norm": grad_norm, "lr": learning_rate, "optimizer_steps": float(grad_norm > 0)}

    def _grad_norm(self) -> float:
        """The norm of the whole gradient before clipping. Raises NotFiniteError.

        It is computed before Megatron's optimizer step, which would write a NaN into the weights. That step computes
        the norm again: one more pass over this rank's gradients, so that clipping stays Megatron's.
        """
        found = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if found or not math.isfinite(grad_norm):
            raise NotFiniteError(f"the gradient norm is {grad_norm}")
        return grad_norm

    def _counts(self, batch: RolloutBatch) -> StepCounts:
        """The denominators over the rollouts of all ranks."""
        assert batch.counted is not None
        clip = 0.0
        if batch.clip_weight is not None:
            share = self.trainer.minibatch_prompts * self.echorl.constant_length / self.parallel.data_size
            mask, normalizer = batch.response_mask, self.echorl.normalizer
            clip = float(clip_denominator(batch.clip_weight, mask, normalizer, constant=share))
        own = (
            float(batch.counted.sum()),
            float(batch.response_mask[batch.counted].sum()),
            float(batch.response_mask.sum()),
            0.0 if batch.mastered is None else float(batch.mastered.sum()),
            clip,
            0.0 if batch.hint_mask is None else float(batch.hint_mask.sum()),
        )
        rollouts, tokens, response_tokens, mastered, clip, hints = self.parallel.sum_over_data(own)
        totals = StepTotals(rollouts=rollouts, tokens=tokens, response_tokens=response_tokens, mastered=mastered)
        return StepCounts(totals, clip, hints)

    def _loss_of_logits(
        self, counts: StepCounts, clip_coef: float
    ) -> Callable[[Tensor, MicroBatch], tuple[Tensor, Tensor, Tensor]]:
        """The objective: policy loss, less the entropy bonus, plus ``clip_coef`` x clip loss; one backward for all."""

        def loss_of_logits(logits: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
            logprobs, entropies = self._token_statistics(
                logits, micro, train=True, entropy_grad=self.algo.entropy_coef > 0
            )
            rollouts = micro.rollouts
            assert (
                rollouts.old_logprobs is not None and rollouts.advantages is not None and rollouts.counted is not None
            )
            outputs = policy_loss(
                LossInputs(
                    logprobs=logprobs,
                    old_logprobs=rollouts.old_logprobs,
                    advantages=rollouts.advantages,
                    response_mask=rollouts.response_mask,
                    counted=rollouts.counted,
                    entropies=entropies,
                    totals=counts.totals,
                    rollout_logprobs=rollouts.rollout_logprobs,
                    reference_logprobs=rollouts.reference_logprobs,
                    mastered=rollouts.mastered,
                    expert=rollouts.expert,
                ),
                self.algo,
            )
            loss, clip, hint = outputs.loss, torch.zeros_like(outputs.loss), torch.zeros_like(outputs.loss)
            if rollouts.clip_weight is not None:
                clip = clip_loss(logprobs, rollouts.clip_weight, counts.clip, token_weight=self.echorl.token_weight)
                loss = loss + clip_coef * clip
            if rollouts.hint_mask is not None:
                hint = clip_loss(logprobs, rollouts.hint_mask.to(logprobs.dtype), counts.hint_tokens)
                loss = loss + self.algo.hint_coef * hint
            metrics = {**outputs.metrics, "clip_loss": clip, "hint_loss": hint, "loss": loss}
            report = torch.stack([metrics[name].detach().double() for name in METRICS])
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), report

        return loss_of_logits

    def _sum_reports(self, reports: list[Tensor]) -> dict[str, float]:
        total = torch.stack(reports).sum(dim=0) if reports and self.parallel.is_last_stage else None
        total = self.parallel.broadcast_from_last_stage(total, (len(METRICS),), torch.float64)
        dist.all_reduce(total, group=self.parallel.data_group)
        return dict(zip(METRICS, total.tolist(), strict=True))


def _parameter_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Iterate over the parameter groups in an optimizer's state, which is nested if the optimizer has several parts."""
    if isinstance(state, dict):
        yield from state.get("param_groups", [])
        for part in state.values():
            yield from _parameter_groups(part)


def _finalize_without_rescaling(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's reduction of gradients without its division by a token count: our losses are already divided."""
    finalize_model_grads(model, None, **kwargs)


def _optimizer_config(trainer: TrainerConfig, model_config: Any) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=trainer.lr,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        adam_eps=trainer.adam_eps,
        clip_grad=trainer.clip_grad,
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=True,
    )
