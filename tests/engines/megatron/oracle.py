"""A training step by itself: the papers' formulas, rollout by rollout, in float64 on transformers' model.

Nothing of echorl_nemo is used but the configuration's values. Shapes: T response tokens of a rollout.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from echorl_nemo.schema import RunConfig


@dataclass
class Rollout:
    """One rollout; responses may be empty."""

    prompt: list[int]
    response: list[int]
    group: int
    reward: float
    finished: bool
    noise: list[float]
    """What the rollout engine's log-prob of each token lies above the policy's."""
    old: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[T] log-probs of the policy that the step starts with."""
    entropies: Tensor = field(default_factory=lambda: torch.zeros(0))
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    advantage: float = 0.0
    counted: bool = True
    clip: tuple[int, int] = (0, 0)
    """First token of the clip and the one after its last; equal without a clip."""


class Oracle:
    """The policy with its optimizer."""

    def __init__(self, config: RunConfig, vocabulary: int, boundary: int) -> None:
        self.config, self.vocabulary, self.boundary = config, vocabulary, boundary
        self.model = AutoModelForCausalLM.from_pretrained(
            config.model.path, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        self.start = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.mean = {name: torch.zeros_like(weight) for name, weight in self.start.items()}
        self.square = {name: torch.zeros_like(weight) for name, weight in self.start.items()}
        self.updates = 0

    def scores(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """[T] log-probs and entropies of the response's tokens, at the sampling temperature."""
        tokens = torch.tensor([rollout.prompt + rollout.response])
        logits = self.model(tokens).logits[0, :, : self.vocabulary] / self.config.rollout.temperature
        produced = logits[len(rollout.prompt) - 1 : -1].log_softmax(-1)
        chosen = produced.gather(-1, tokens[0, len(rollout.prompt) :, None])[:, 0]
        return chosen, -(produced.exp() * produced).sum(-1)

    def prepare(self, rollouts: list[Rollout]) -> None:
        """Old log-probs and entropies, and those of the reference policy, which the run started from."""
        current = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        with torch.no_grad():
            for rollout in rollouts:
                rollout.old, rollout.entropies = self.scores(rollout)
            self._set(self.start)
            for rollout in rollouts:
                rollout.reference = self.scores(rollout)[0]
            self._set(current)

    def step(self, rollouts: list[Rollout]) -> dict[str, float]:
        """A training step on prepared rollouts; its metrics."""
        self._advantages(rollouts)
        statistics = self._clips(rollouts) if self.config.echorl.enabled else {}
        groups = list(dict.fromkeys(rollout.group for rollout in rollouts))
        count = self.config.trainer.prompts_per_step // self.config.trainer.minibatch_prompts
        done = []
        for first in range(count):
            chosen = set(groups[first::count])
            done.append(self._update([rollout for rollout in rollouts if rollout.group in chosen]))
        means = {name: sum(step[name] for step in done) / count for name in done[0]}
        return {**means, **{f"echorl.{name}": value for name, value in statistics.items()}}

    def _set(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(weights[name])

    # ---- advantages

    def _advantages(self, rollouts: list[Rollout]) -> None:
        algo, budget = self.config.algo, self.config.rollout.max_new_tokens
        shaped = []
        for rollout in rollouts:
            reward, length = rollout.reward, len(rollout.response)
            if algo.overlong_buffer:
                beyond = (length - (budget - algo.overlong_buffer)) / algo.overlong_buffer
                reward -= min(1.0, max(0.0, beyond)) * algo.overlong_penalty
            if algo.kl_coef and algo.kl_in == "reward":
                reward -= algo.kl_coef * float(self._kl(rollout.old, rollout.reference).sum())
            shaped.append(reward)
        for i, rollout in enumerate(rollouts):
            compared = [
                value
                for value, other in zip(shaped, rollouts, strict=True)
                if other.group == rollout.group or algo.estimator == "reinforce_plus_plus"
            ]
            rollout.advantage = self._advantage(shaped[i], compared)
        for rollout in rollouts:
            live = any(other.advantage != 0 for other in rollouts if other.group == rollout.group)
            rollout.counted = (live or algo.denominator == "all") and (rollout.finished or not algo.overlong_filter)

    def _advantage(self, reward: float, compared: list[float]) -> float:
        if min(compared) == max(compared):
            return 0.0
        mean = sum(compared) / len(compared)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in compared) / (len(compared) - 1))
        match self.config.algo.estimator:
            case "grpo" | "reinforce_plus_plus":
                return (reward - mean) / (deviation + 1e-6)
            case "dr_grpo":
                return reward - mean
            case "rloo":
                return reward - (sum(compared) - reward) / (len(compared) - 1)
        raise AssertionError(self.config.algo.estimator)

    def _kl(self, own: Tensor, reference: Tensor) -> Tensor:
        log_ratio = reference - own
        return {
            "k1": -log_ratio,
            "k2": log_ratio**2 / 2,
            "k3": log_ratio.exp() - 1 - log_ratio,
        }[self.config.algo.kl_estimator]

    # ---- clips

    def _steps(self, rollout: Rollout) -> list[tuple[int, int]]:
        """(first token, the one after the last) of each step."""
        steps, start = [], 0
        for at, token in enumerate(rollout.response):
            following = rollout.response[at + 1] if at + 1 < len(rollout.response) else None
            if token == self.boundary and following != self.boundary:
                steps.append((start, at + 1))
                start = at + 1
        if start < len(rollout.response):
            steps.append((start, len(rollout.response)))
        return steps

    def _heights(self, rollout: Rollout) -> list[float]:
        heights = []
        for start, end in self._steps(rollout):
            inside = rollout.entropies[start:end]
            kinds = {"mean": inside.mean(), "max": inside.max(), "sum": inside.sum()}
            heights.append(float(kinds[self.config.echorl.step_reduction]))
        return heights

    def _clips(self, rollouts: list[Rollout]) -> dict[str, float]:
        settings = self.config.echorl
        eligible = []
        for rollout in rollouts:
            rollout.clip = (0, 0)
            group = [other for other in rollouts if other.group == rollout.group]
            success = rollout.reward >= settings.success_reward
            if settings.scope == "degenerate":
                success = all(other.reward >= settings.success_reward for other in group)
            if success and rollout.finished and rollout.response:
                eligible.append(rollout)
        chosen = eligible
        if settings.per_group != "all":
            choose = {"top": max, "lowest": min}[settings.per_group]
            chosen = [
                choose((other for other in eligible if other.group == group), key=lambda each: max(self._heights(each)))
                for group in dict.fromkeys(rollout.group for rollout in eligible)
            ]
        ends: list[bool] = []
        peaks: list[float] = []
        for rollout in chosen:
            steps, heights = self._steps(rollout), self._heights(rollout)
            peak, low = heights.index(max(heights)), heights.index(min(heights))
            first, last = {
                "prefix": (0, peak), "full": (0, len(steps) - 1), "peak_step": (peak, peak),
                "tail": (peak + 1, len(steps) - 1), "lowest_prefix": (0, low),
            }[settings.span]  # fmt: skip
            if first <= last:
                rollout.clip = (steps[first][0], steps[last][1])
                ends.append(rollout.clip[1] == len(rollout.response))
                peaks.append((peak + 0.5) / len(steps))
        clipped = [rollout for rollout in rollouts if rollout.clip[0] < rollout.clip[1]]
        tokens = sum(rollout.clip[1] - rollout.clip[0] for rollout in clipped)
        segmented = [len(self._steps(rollout)) for rollout in rollouts if rollout.response]
        return {
            "clips": len(clipped),
            "clip_tokens": tokens,
            "clip_share": tokens / max(1, sum(len(rollout.response) for rollout in clipped)),
            "stop_coverage": sum(ends) / max(1, len(ends)),
            "relative_peak": sum(peaks) / max(1, len(peaks)),
            "eligible": len(eligible),
            "unsegmented": sum(count == 1 for count in segmented) / len(segmented),
        }

    # ---- an optimizer step

    def _update(self, rollouts: list[Rollout]) -> dict[str, float]:
        algo, echorl = self.config.algo, self.config.echorl
        counted = [rollout for rollout in rollouts if rollout.counted]
        counted_tokens = max(1, sum(len(rollout.response) for rollout in counted))
        all_tokens = max(1, sum(len(rollout.response) for rollout in rollouts))
        clipped = [rollout for rollout in rollouts if rollout.clip[0] < rollout.clip[1]]
        clip_tokens = sum(rollout.clip[1] - rollout.clip[0] for rollout in clipped)
        denominator = {
            "clip_mean": len(clipped),
            "clip_tokens": clip_tokens,
            "response_tokens": all_tokens,
            "constant": len({rollout.group for rollout in rollouts}) * echorl.constant_length,
        }[echorl.normalizer]
        names = ("policy_loss", "clip_loss", "entropy", "ratio_clipped", "kl_old", "kl_reference", "mismatch_dropped")
        metrics = dict.fromkeys(names, 0.0)
        total = torch.zeros((), dtype=torch.float64, requires_grad=True) * 1.0
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        for rollout in rollouts:
            own, entropies = self.scores(rollout)
            metrics["entropy"] += float(entropies.sum()) / all_tokens
            start, end = rollout.clip
            if start < end and echorl.enabled:
                inside = own[start:end]
                damped = inside.detach().exp() if echorl.token_weight == "probability" else torch.ones_like(inside)
                clip = -(damped * inside).sum() / denominator
                if echorl.normalizer == "clip_mean":
                    clip = clip / (end - start)
                metrics["clip_loss"] += float(clip)
                total = total + echorl.coef * clip
            if not rollout.counted or not rollout.response:
                continue
            weight = {
                "rollout_mean": 1 / len(rollout.response) / max(1, len(counted)),
                "token_mean": 1 / counted_tokens,
                "constant": 1 / (max(1, len(counted)) * algo.constant_length),
            }[algo.aggregation]
            loss, changed, dropped = self._policy_loss(rollout, own)
            kl = self._kl(own, rollout.reference) if algo.kl_coef else torch.zeros_like(own)
            metrics["policy_loss"] += float(loss.sum()) * weight
            log_ratio = own - rollout.old
            metrics["ratio_clipped"] += float(changed.sum()) / counted_tokens
            metrics["kl_old"] += float((log_ratio.exp() - 1 - log_ratio).sum()) / counted_tokens
            metrics["kl_reference"] += float(kl.sum()) / counted_tokens
            metrics["mismatch_dropped"] += float(dropped.sum()) / counted_tokens
            total = total + weight * (loss.sum() - algo.entropy_coef * entropies.sum())
            if algo.kl_in == "loss":
                total = total + algo.kl_coef * weight * kl.sum()
        total.backward()
        return {**metrics, "loss": float(total), **self._adamw()}

    def _policy_loss(self, rollout: Rollout, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T] loss of each token, where the clip changed it, and where IcePop took it out."""
        algo, advantage = self.config.algo, rollout.advantage
        log_ratio = own - rollout.old
        if algo.loss == "gspo":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio = log_ratio.exp()
        bounded = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
        if algo.loss == "cispo":
            loss, changed = -bounded.detach() * advantage * own, bounded != ratio
        else:
            loss = -torch.minimum(ratio * advantage, bounded * advantage)
            changed = bounded * advantage < ratio * advantage
        weights = torch.ones_like(own)
        mismatch = (-torch.tensor(rollout.noise, dtype=torch.float64)).exp()  # pi_old / pi_rollout
        if algo.tis_cap is not None:
            weights = mismatch.clamp(max=algo.tis_cap)
        if algo.icepop_low is not None:
            weights = weights * (mismatch >= algo.icepop_low)
        if algo.icepop_high is not None:
            weights = weights * (mismatch <= algo.icepop_high)
        return loss * weights, changed, weights == 0

    def _adamw(self) -> dict[str, float]:
        trainer = self.config.trainer
        norm = math.sqrt(sum(float((weight.grad**2).sum()) for weight in self.model.parameters()))
        rate = trainer.lr * min(1.0, (self.updates + 1) / max(1, trainer.warmup_steps))
        if norm == 0:
            return {"grad_norm": 0.0, "lr": rate, "optimizer_steps": 0.0}
        self.updates += 1
        scale = min(1.0, trainer.clip_grad / (norm + 1e-6))
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                gradient = weight.grad * scale
                self.mean[name] = trainer.adam_beta1 * self.mean[name] + (1 - trainer.adam_beta1) * gradient
                self.square[name] = trainer.adam_beta2 * self.square[name] + (1 - trainer.adam_beta2) * gradient**2
                mean = self.mean[name] / (1 - trainer.adam_beta1**self.updates)
                square = self.square[name] / (1 - trainer.adam_beta2**self.updates)
                if weight.dim() > 1:  # norms and biases do not decay
                    weight.mul_(1 - rate * trainer.weight_decay)
                weight.sub_(rate * mean / (square.sqrt() + trainer.adam_eps))
        return {"grad_norm": norm, "lr": rate, "optimizer_steps": 1.0}

    def weights(self) -> dict[str, Tensor]:
        """The current weights, by their Hugging Face names."""
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
