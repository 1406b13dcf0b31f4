"""A toy policy behind NeMo-RL's interfaces, and a batch of rollouts as its trainers have it."""

from typing import Any

import torch
from nemo_rl.models.policy.lm_policy import Policy
from torch import Tensor

from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.engines.nemo_rl.policy import EchoPolicy
from echorl_nemo.engines.nemo_rl.step import EchoStep

VOCABULARY, NEWLINE = 12, 1


class Bigram:
    """Logits of the next token from this one, [V, V]; and how a step is cut up."""

    def __init__(self, replicas: int = 1, micro_batch_size: int = 4, shuffle: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.weight = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
        self.replicas, self.micro_batch_size, self.shuffle = replicas, micro_batch_size, shuffle
        self.gradients: list[Tensor] = []

    def statistics(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each [N, S], 0 at the first token."""
        logs = self.weight[ids].log_softmax(dim=-1)
        logprobs = logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        entropies = -(logs.exp() * logs).sum(dim=-1)[:, :-1]
        return tuple(torch.nn.functional.pad(values, (1, 0)) for values in (logprobs, entropies))  # type: ignore[return-value]


class ToyPolicy(Policy):
    """What `Policy` does over Ray, in this process: log-probs, and training over replicas and micro-batches."""

    model: Bigram

    def get_logprobs(self, data: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            logprobs, entropies = self.model.statistics(data["input_ids"])
        return {"logprobs": logprobs, "entropies": entropies}

    def train(self, data: Any, loss_fn: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        size, model = self.cfg["train_global_batch_size"], self.model
        metrics: dict[str, list[float]] = {}
        loss_sum = 0.0
        for start in range(0, len(data["input_ids"]), size):
            rows = torch.arange(start, min(start + size, len(data["input_ids"])))
            if model.shuffle is not None:  # as packing and dynamic batching reorder a global batch
                rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(model.shuffle))]
            sequences = data["sample_mask"][rows].sum()
            tokens = (data["token_mask"][rows, 1:] * data["sample_mask"][rows, None]).sum()
            model.weight.grad = None
            for share in rows.chunk(model.replicas):
                for micro_rows in share.split(model.micro_batch_size):
                    micro = {key: value[micro_rows] for key, value in data.items()}
                    logprobs = model.statistics(micro["input_ids"])[0][:, 1:]
                    loss, reported = loss_fn(logprobs, micro, global_valid_seqs=sequences, global_valid_toks=tokens)
                    loss.backward()
                    loss_sum += float(loss)
                    for name, value in reported.items():
                        metrics.setdefault(name, []).append(value)
            metrics.setdefault("global_valid_toks", []).append(float(tokens))
            assert model.weight.grad is not None
            model.gradients.append(model.weight.grad.clone())
        return {"loss": torch.tensor(loss_sum), "grad_norm": model.gradients[-1].norm(), "all_mb_metrics": metrics}


class EchoToyPolicy(EchoPolicy, ToyPolicy):
    """Our policy, with the toy in the place of Ray."""


def toy_policy(config: EchoRLConfig, model: Bigram, global_batch_size: int) -> EchoToyPolicy:
    policy = EchoToyPolicy.__new__(EchoToyPolicy)  # its __init__ would ask Ray for workers
    policy.step = EchoStep(config)
    policy.step.boundary_ids = (NEWLINE,)
    policy.cfg = {"train_global_batch_size": global_batch_size, "train_micro_batch_size": model.micro_batch_size}
    policy.model = model
    return policy


def rollouts(rewards: list[list[float]], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(train data, repeated batch) of a group for each list of rewards."""
    generator = torch.Generator().manual_seed(seed)
    groups, size, width = len(rewards), len(rewards[0]), 16
    count = groups * size
    prompts = torch.randint(2, VOCABULARY, (groups, 3), generator=generator).repeat_interleave(size, dim=0)
    prompts[:, 0] = torch.arange(groups).repeat_interleave(size) + 2
    tokens = torch.randint(2, VOCABULARY, (count, width), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.25] = NEWLINE
    tokens[:, :3] = prompts
    lengths = torch.randint(6, width + 1, (count,), generator=generator)
    positions = torch.arange(width)
    mask = (positions >= 3) & (positions < lengths[:, None])
    data = {
        "input_ids": tokens,
        "input_lengths": lengths,
        "token_mask": mask.double(),
        "sample_mask": torch.ones(count, dtype=torch.float64),
        "generation_logprobs": torch.zeros(count, width, dtype=torch.float64),
        "reference_policy_logprobs": torch.zeros(count, width, dtype=torch.float64),
    }
    truncated = torch.zeros(count, dtype=torch.bool)
    return data, {"prompt_ids": prompts, "total_reward": torch.tensor(rewards).flatten(), "truncated": truncated}


def loss_config(real: bool, **settings: Any) -> Any:
    """Of the clipped loss with `echorl`, in the type that the installed version takes."""
    values = {"reference_policy_kl_penalty": 0.0, "kl_input_clamp_value": None, "kl_output_clamp_value": None}
    values |= settings
    if not real:
        return values
    from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig

    defaults = {
        "reference_policy_kl_type": "k3", "ratio_clip_min": 0.2, "ratio_clip_max": 0.2, "ratio_clip_c": None,
        "use_on_policy_kl_approximation": False, "use_importance_sampling_correction": False,
        "truncated_importance_sampling_ratio": None, "sequence_level_importance_ratios": False,
        "token_level_loss": True, "force_on_policy_ratio": False, "disable_ppo_ratio": False, "use_kl_in_reward": False,
    }  # fmt: skip
    return ClippedPGLossConfig(**{**defaults, **values})
