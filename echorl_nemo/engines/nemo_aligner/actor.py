"""The GRPO actor: NeMo-Aligner's REINFORCE actor with exact entropies, a GRPO-family loss and the clip loss.

NeMo-Aligner's convention for token tensors is [B, S - 1]: column t belongs to token t + 1, which the logits of position
t produced. Shapes: B rollouts of a batch, b of a micro-batch, S positions, v vocabulary columns of this rank.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.trainer import Trainer
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import divide
from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split
from nemo.collections.nlp.parts.utils_funcs import get_last_rank
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import broadcast_tensor_within_pp
from nemo_aligner.utils.train_utils import set_sync_funcs
from omegaconf import DictConfig, open_dict
from torch import Tensor

from echorl_nemo.echo import clip_denominator, clip_loss
from echorl_nemo.engines.nemo_aligner.config import method_config
from echorl_nemo.grpo import LossInputs, StepTotals, policy_loss
from echorl_nemo.ops import logprob_and_entropy

METRICS = ("loss", "policy_loss", "clip_loss", "entropy", "ratio_clipped", "kl_old", "kl_reference")
"""Metrics of a micro-batch. Each adds up over micro-batches and replicas."""

Batch = dict[str, Tensor]
"""Tensors of an optimizer step by name: `response_tokens` [B, S]; `mask` (the response) [B, S - 1] bool; `clip_weight`
[B, S - 1] float32; `old_logprobs` and, with a KL, `init_logprobs` [B, S - 1] nats; `advantages` [B] or [B, S - 1];
`counted` [B] bool."""


class MegatronGPTEchoGRPOActorModel(MegatronGPTReinforceActorModel):
    """NeMo-Aligner's REINFORCE actor with the losses of this package. `model.grpo` (upstream's keys of
    `model.reinforce`, and `algo`) and `model.echorl` configure it."""

    def __init__(self, cfg: DictConfig, trainer: Trainer) -> None:
        """Raises UserError for a setting that does not exist or that NeMo-Aligner does not support."""
        self.algo, self.echorl = method_config(cfg)
        with open_dict(cfg):
            cfg.reinforce = cfg.grpo  # the parent class reads this key
        super().__init__(cfg, trainer)
        sampling = cfg.grpo.sampling_params
        self.temperature = 1.0 if sampling.get("use_greedy", False) else float(sampling.temperature)
        self._totals, self._clip_denominator = StepTotals(0.0, 0.0, 0.0), 0.0
        self.clip_coef = self.echorl.coef
        """Weight of the clip loss in the current training step; the trainer sets it."""
        self.rollouts_per_prompt = 1
        """Size of a group; the trainer sets it."""

    @torch.no_grad()
    def score(self, response_tokens: Tensor, forward_micro_batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs of the tokens, and exact entropies of the distributions that produced them, each [B, S - 1] nats.

        Both come from the same logits, and are returned on every pipeline stage. ``response_tokens`` [B, S].
        """
        set_sync_funcs(self, forward_only=True)
        rows, sequence_length = response_tokens.shape
        size = forward_micro_batch_size or self.forward_micro_batch_size
        count = divide(rows, size)
        attention_mask, _, position_ids = self.get_ltor_masks_and_position_ids(response_tokens)
        batches = get_iterator_k_split([response_tokens, attention_mask, position_ids], count)
        scored = get_forward_backward_func()(
            forward_step_func=self.get_logprob_output_only_func(),
            data_iterator=self._make_data_iterator_list(batches),
            model=self.model,
            num_microbatches=count,
            forward_only=True,
            seq_length=sequence_length,
            micro_batch_size=size,
            collect_non_loss_data=True,
        )
        table = torch.cat(scored, dim=1) if scored else None  # [2, B, S - 1], on the last stage
        table = broadcast_tensor_within_pp(table, dtype=torch.float32)
        return table[0], table[1]

    def get_inference_log_probs(self, response_tokens: Tensor, forward_micro_batch_size: int | None = None) -> Tensor:
        """The log-probs of `score`. The parent class calls this to score the reference policy."""
        return self.score(response_tokens, forward_micro_batch_size)[0]

    def get_logprob_output_only_func(self, inference_only: bool = True) -> Callable[..., Any]:
        """A forward step for Megatron's schedule. Its output becomes [2, b, S - 1]: log-probs and entropies."""
        forward_only = self.get_forward_output_only_func()

        def forward_step(batches: Iterator[list[Tensor]], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
            batch = next(batches)
            output, _ = forward_only(iter([batch]), model)

            def statistics(logits: Tensor, non_loss_data: bool = True) -> Tensor:
                return torch.stack(self._token_statistics(logits, batch[0].to(logits.device)))

            return output, statistics

        return forward_step

    def get_loss_and_metrics(self, batch: Batch, forward_only: bool) -> tuple[float, dict[str, float]]:
        """Run forward and backward over this replica's share of an optimizer step. Returns loss and metrics of the
        whole step.

        The denominators are counted over all replicas first, so that the result does not depend on how the rollouts are
        distributed.
        """
        self._count(batch)
        attention_mask, _, position_ids = self.get_ltor_masks_and_position_ids(tokens=batch["response_tokens"])
        batch = {**batch, "attention_mask": attention_mask, "position_ids": position_ids}
        set_sync_funcs(self, forward_only)
        reports = get_forward_backward_func()(
            forward_step_func=self.get_actor_forward_output_and_loss_func(),
            data_iterator=self._make_data_iterator_list(get_iterator_k_split(batch, get_num_microbatches())),
            model=self.model,
            num_microbatches=get_num_microbatches(),
            forward_only=forward_only,
            seq_length=batch["response_tokens"].shape[1],
            micro_batch_size=self.cfg.micro_batch_size,
        )
        total = torch.zeros(len(METRICS), dtype=torch.float64, device=torch.cuda.current_device())
        if reports:  # on the last pipeline stage
            total += torch.stack([report["report"] for report in reports]).sum(dim=0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        dist.broadcast(total, get_last_rank())
        metrics = dict(zip(METRICS, total.tolist(), strict=True))
        return metrics["loss"], metrics

    def get_actor_forward_output_and_loss_func(self) -> Callable[..., Any]:
        """A forward step of training for Megatron's schedule: the model's output, and the function that computes the
        loss."""

        def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            wanted = _keys_of_this_stage(batch)
            here = {key: value.cuda(non_blocking=True) for key, value in batch.items() if key in wanted}
            # a pipeline stage without an embedding takes what the one before it sends
            output = model(here.get("response_tokens"), here.get("position_ids"), here["attention_mask"], labels=None)
            return output, partial(self._loss, here)

        return forward_step

    def _loss(self, batch: Batch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of a micro-batch, policy loss + coef * clip loss; ``logits`` [b, S, v]."""
        logprobs, entropies = self._token_statistics(
            logits, batch["response_tokens"], train=True, entropy_grad=self.algo.entropy_coef > 0
        )
        mask = batch["mask"]
        outputs = policy_loss(
            LossInputs(
                logprobs=logprobs,
                old_logprobs=batch["old_logprobs"],
                advantages=batch["advantages"],
                response_mask=mask,
                counted=batch["counted"],
                entropies=torch.where(mask, entropies, 0.0),
                totals=self._totals,
                reference_logprobs=batch.get("init_logprobs"),
            ),
            self.algo,
        )
        clip = clip_loss(logprobs, batch["clip_weight"], self._clip_denominator, token_weight=self.echorl.token_weight)
        loss = outputs.loss + self.clip_coef * clip if self.echorl.enabled else outputs.loss
        metrics = {**outputs.metrics, "clip_loss": clip, "loss": loss}
        report = torch.stack([metrics[name].detach().double() for name in METRICS])
        # undo Megatron's division by the number of micro-batches and NeMo's averaging over replicas: this loss is
        # already a share of the whole step
        scale = get_num_microbatches() * parallel_state.get_data_parallel_world_size()
        return loss * scale, {"report": report}

    def _count(self, batch: Batch) -> None:
        """Count the denominators of the optimizer step over all replicas."""
        mask, counted = batch["mask"], batch["counted"]
        counts = torch.stack(
            [
                counted.sum(),
                mask[counted].sum(),
                mask.sum(),
                clip_denominator(
                    batch["clip_weight"],
                    mask,
                    self.echorl.normalizer,
                    constant=len(mask) / self.rollouts_per_prompt * self.echorl.constant_length,
                ),
            ]
        ).to(torch.cuda.current_device(), torch.float64)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        rollouts, tokens, response_tokens, self._clip_denominator = counts.tolist()
        self._totals = StepTotals(rollouts=rollouts, tokens=tokens, response_tokens=response_tokens)

    def _token_statistics(
        self, logits: Tensor, tokens: Tensor, *, train: bool = False, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each [b, S - 1]; ``logits`` [b, S, v], ``tokens`` [b, S]."""
        logprobs, entropies = logprob_and_entropy(
            logits,
            tokens.roll(-1, dims=1),  # position t's logits produced token t + 1; the last one's are not used
            group=parallel_state.get_tensor_model_parallel_group(),
            temperature=self.temperature,
            vocab_size=self.tokenizer.vocab_size,  # NeMo pads, and never samples from the padding
            entropy_grad=entropy_grad,
            inplace_backward=train,
        )
        return logprobs[:, :-1], entropies[:, :-1]


def _keys_of_this_stage(batch: Batch) -> set[str]:
    """Keys of the tensors that this pipeline stage needs: tokens for the embedding, the others for the loss."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return set(batch)
    wanted = {"attention_mask"}
    if parallel_state.is_pipeline_first_stage():
        wanted |= {"response_tokens", "position_ids"}
    if parallel_state.is_pipeline_last_stage():
        wanted |= set(batch) - {"position_ids"}
    return wanted
