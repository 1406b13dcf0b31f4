"""Records rewards and entropies of a training step on NeMo-RL's driver, and computes the weights of the EchoClips.

Shapes: N rollouts of a step, S positions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from echorl_nemo.echo import (
    EchoRLConfig,
    clip_coefficient,
    clip_denominator,
    count_steps_before,
    segment_steps,
    select_clips,
)
from echorl_nemo.echo.config import needs_steps_before


class EchoStep:
    """The record of one training step. The trainer fills in rewards and entropies; `weights` uses them and clears them
    for the next step."""

    def __init__(self, config: EchoRLConfig) -> None:
        self.config = config
        self.boundary_ids: tuple[int, ...] = ()
        self._rewards: Tensor | None = None
        self._group_ids: Tensor | None = None
        self._finished: Tensor | None = None
        self._entropies: Tensor | None = None

    def record_rewards(self, prompt_ids: Tensor, rewards: Tensor, repeated_batch: Mapping[str, Any] | None) -> None:
        """Record the rewards of a step: ``prompt_ids`` [N] or [N, P], equal for the rollouts of a prompt; ``rewards``
        [N]. ``repeated_batch`` may hold `unshaped_total_reward` [N] and `truncated` [N]."""
        batch = repeated_batch if repeated_batch is not None else {}
        unshaped = batch.get("unshaped_total_reward")
        self._rewards = torch.as_tensor(rewards if unshaped is None else unshaped).float().cpu()
        ids = torch.as_tensor(prompt_ids).cpu()
        self._group_ids = ids.view(len(ids), -1).unique(dim=0, return_inverse=True)[1]
        truncated = batch.get("truncated")
        self._finished = torch.ones(len(ids), dtype=torch.bool)
        if truncated is not None:
            self._finished = ~torch.as_tensor(truncated, dtype=torch.bool).cpu()

    def record_entropies(self, entropies: Tensor) -> None:
        """Record the entropies of a step, [N, S] nats, aligned to the tokens that the distributions produced."""
        self._entropies = entropies.cpu()

    def weights(
        self, data: Mapping[str, Any], global_batch_size: int, *, token_level: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """The weight of each token in the clip loss, [N, S] float32, and the statistics of the clips.

        ``data``: the trainer's batch with `input_ids`, `token_mask` [N, S] and `sample_mask` [N]. Each
        ``global_batch_size`` rollouts are one optimizer step, for which NeMo-RL divides the loss by D: the valid tokens
        if ``token_level``, otherwise the valid sequences. A token of weight w gets w D / Z, times the factor that
        `echorl.coef_schedule` gives the coefficient in this step.

        Raises RuntimeError if rewards or entropies of these rollouts were not recorded.
        """
        rollouts = len(data["input_ids"])
        rewards, finished, group_ids = self._rewards, self._finished, self._group_ids
        entropies, self._rewards, self._entropies = self._entropies, None, None
        if rewards is None or finished is None or group_ids is None or len(rewards) != rollouts:
            raise RuntimeError(
                f"EchoRL has the rewards of {0 if rewards is None else len(rewards)} rollouts and must train "
                f"{rollouts}: this trainer does not estimate advantages from rewards; use NeMo-RL's GRPO trainer"
            )
        if entropies is None or len(entropies) != rollouts:
            raise RuntimeError(
                f"EchoRL has the entropies of {0 if entropies is None else len(entropies)} rollouts and must train "
                f"{rollouts}: the log-prob pass was skipped or ran on other rollouts"
            )
        valid = data["token_mask"].cpu().bool() & (data["sample_mask"].cpu() > 0)[:, None]
        tokens = data["input_ids"].cpu()
        entropies = entropies[:, : tokens.shape[1]].float()
        before = count_steps_before(tokens, valid, self.boundary_ids) if needs_steps_before(self.config) else None
        selection = select_clips(
            entropies,
            segment_steps(tokens, valid, self.boundary_ids),
            rewards=rewards,
            finished=finished,
            group_ids=group_ids,
            config=self.config,
            steps_before=before,
        )
        entropy = float(entropies[valid].double().mean()) if valid.any() else 0.0
        coef = clip_coefficient(self.config, step=0, entropy=entropy)
        factor = coef / self.config.coef if self.config.coef else 1.0
        weights = torch.zeros_like(selection.weight)
        for start in range(0, rollouts, global_batch_size):
            part = slice(start, start + global_batch_size)
            divided = _valid_tokens(data, part) if token_level else float(data["sample_mask"][part].sum())
            prompts = (min(start + global_batch_size, rollouts) - start) / rollouts * len(group_ids.unique())
            count = clip_denominator(
                selection.weight[part],
                valid[part],
                self.config.normalizer,
                constant=prompts * self.config.constant_length,
            )
            weights[part] = selection.weight[part] * (factor * divided / (float(count) or 1.0))
        return weights, {**selection.stats, "coef": coef}


def _valid_tokens(data: Mapping[str, Any], part: slice) -> float:
    """The valid tokens of rows ``part``, counted like NeMo-RL's workers: the first position has no log-prob."""
    return float((data["token_mask"][part, 1:] * data["sample_mask"][part, None]).sum())
