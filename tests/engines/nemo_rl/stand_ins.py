"""Stand-ins for NeMo-RL and Ray, which cannot be installed with the tests (no package on PyPI, Python 3.13): the
interfaces that our plug-in touches, with the conventions of v0.7. With a checkout on the path they are not used.
"""

import importlib.machinery
import sys
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class BatchedDataDict(dict[str, Any]):
    """nemo_rl.distributed.batched_data_dict."""

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class LossType(Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class ClippedPGLossFn:
    """nemo_rl.algorithms.loss.loss_functions: the clipped loss over global counts."""

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.loss_type = LossType.TOKEN_LEVEL if cfg.get("token_level_loss", True) else LossType.SEQUENCE_LEVEL
        self.clip = cfg.get("ratio_clip_min", 0.2), cfg.get("ratio_clip_max", 0.2)
        self.metric_normalizations = {"loss": "tokens"}

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        advantages = data["advantages"][:, 1:]
        ratio = (next_token_logprobs - data["prev_logprobs"][:, 1:]).exp()
        token_loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - self.clip[0], 1 + self.clip[1]) * advantages)
        if self.loss_type is LossType.TOKEN_LEVEL:
            loss = (token_loss * mask).sum() / (global_valid_toks + 1e-8)
        else:
            means = (token_loss * mask).sum(dim=1) / (mask.sum(dim=1) + 1e-8)
            loss = (means * data["sample_mask"]).sum() / (global_valid_seqs + 1e-8)
        return loss, {"loss": loss.item()}


class Policy:
    """nemo_rl.models.policy.lm_policy; the tests give it a model."""

    def __init__(
        self, cluster: Any, config: Any, tokenizer: Any, worker_extension_cls_fqn: str | None = None, **kwargs: Any
    ) -> None:
        self.cfg, self.worker = config, worker_extension_cls_fqn


class LogprobsPostProcessor:
    """nemo_rl.models.megatron.train; its log-probs do not matter here."""

    def __init__(self, cfg: Any, sampling_params: Any = None) -> None:
        self.cfg = cfg

    def __call__(self, data_dict: Any, input_ids: Tensor, cu_seqlens_padded: Tensor | None) -> Callable[[Tensor], Any]:
        return lambda logits: (torch.zeros(()), {"logprobs": torch.zeros(data_dict["input_ids"].shape)})


def allgather_cp_sharded_tensor(tensor: Tensor, cp_group: Any, seq_dim: int = 1) -> Tensor:
    """nemo_rl.distributed.model_utils: the whole sequence from its zigzag parts."""
    world = dist.get_world_size(cp_group)
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous(), group=cp_group)
    halves = [part.chunk(2, dim=seq_dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim=seq_dim)


class MegatronPolicyWorkerImpl:
    """nemo_rl.models.policy.workers.megatron_policy_worker: micro-batches through the module's post-processor."""

    cfg: dict[str, Any]
    model: Callable[[Tensor], Tensor]

    def get_logprobs(self, *, data: Any, micro_batch_size: int | None = None) -> BatchedDataDict:
        upstream: Any = sys.modules["nemo_rl.models.policy.workers.megatron_policy_worker"]
        processor = upstream.LogprobsPostProcessor(cfg=self.cfg, sampling_params=None)
        size, parts = micro_batch_size or 2, []
        for start in range(0, len(data["input_ids"]), size):
            ids = data["input_ids"][start : start + size]
            ids = ids[:, : int(data["input_lengths"][start : start + size].max())]  # as dynamic batching cuts them
            micro = BatchedDataDict(input_ids=ids)
            _, output = processor(data_dict=micro, input_ids=ids, cu_seqlens_padded=None)(self.model(ids))
            parts.append(torch.nn.functional.pad(output["logprobs"], (0, data["input_ids"].shape[1] - ids.shape[1])))
        return BatchedDataDict(logprobs=torch.cat(parts))

    def get_reference_policy_logprobs(self, *, data: Any, micro_batch_size: int | None = None) -> BatchedDataDict:
        return BatchedDataDict(reference_logprobs=self.get_logprobs(data=data)["logprobs"])


class GRPOAdvantageEstimator:
    """nemo_rl.algorithms.advantage_estimator."""

    def compute_advantage(self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        groups = prompt_ids.unique(dim=0, return_inverse=True)[1]
        means = torch.stack([rewards[groups == group].mean() for group in groups])
        return (rewards - means)[:, None].expand(mask.shape)


def grpo_train(policy: Any, loss_fn: Any, estimator: Any, train_data: Any, repeated_batch: Any) -> dict[str, Any]:
    """The order of nemo_rl.algorithms.grpo.grpo_train, for one step."""
    train_data["prev_logprobs"] = policy.get_logprobs(train_data)["logprobs"]
    mask = train_data["token_mask"] * train_data["sample_mask"].unsqueeze(-1)
    train_data["advantages"] = estimator.compute_advantage(
        prompt_ids=repeated_batch["prompt_ids"],
        rewards=repeated_batch["total_reward"],
        mask=mask,
        repeated_batch=repeated_batch,
        logprobs_policy=train_data["prev_logprobs"],
    )
    return policy.train(train_data, loss_fn)


def setup(config: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    grpo: Any = sys.modules["nemo_rl.algorithms.grpo"]
    policy = grpo.Policy(cluster=None, config=config["policy"], tokenizer=tokenizer)
    return policy, grpo.ClippedPGLossFn(config["loss_fn"]), grpo._create_advantage_estimator(config)


def _load_config(config_path: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.load(config_path)


def _parse_hydra_overrides(cfg: Any, overrides: list[str]) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.merge(cfg, OmegaConf.from_dotlist([override.lstrip("+") for override in overrides]))


MODULES: dict[str, dict[str, Any]] = {
    "nemo_rl": {},
    "nemo_rl.algorithms": {},
    "nemo_rl.algorithms.loss": {"ClippedPGLossFn": ClippedPGLossFn},
    "nemo_rl.algorithms.loss.loss_functions": {"ClippedPGLossFn": ClippedPGLossFn},
    "nemo_rl.algorithms.grpo": {
        "Policy": Policy, "ClippedPGLossFn": ClippedPGLossFn, "setup": setup, "grpo_train": grpo_train,
        "_create_advantage_estimator": lambda master_config: GRPOAdvantageEstimator(),
    },
    "nemo_rl.distributed": {},
    "nemo_rl.distributed.batched_data_dict": {"BatchedDataDict": BatchedDataDict},
    "nemo_rl.distributed.model_utils": {"allgather_cp_sharded_tensor": allgather_cp_sharded_tensor},
    "nemo_rl.distributed.ray_actor_environment_registry": {
        "ACTOR_ENVIRONMENT_REGISTRY": {
            "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker": "uv run --extra mcore"
        },
    },
    "nemo_rl.models": {},
    "nemo_rl.models.megatron": {},
    "nemo_rl.models.megatron.train": {"LogprobsPostProcessor": LogprobsPostProcessor},
    "nemo_rl.models.megatron.pipeline_parallel": {"broadcast_tensors_from_last_stage": lambda tensors: tensors},
    "nemo_rl.models.policy": {},
    "nemo_rl.models.policy.lm_policy": {"Policy": Policy},
    "nemo_rl.models.policy.workers": {},
    "nemo_rl.models.policy.workers.megatron_policy_worker": {
        "MegatronPolicyWorkerImpl": MegatronPolicyWorkerImpl, "LogprobsPostProcessor": LogprobsPostProcessor,
        "get_runtime_env_for_policy_worker": lambda policy_worker_name: {},
    },
    "nemo_rl.utils": {},
    "nemo_rl.utils.venvs": {
        "create_local_venv_on_each_node": lambda py_executable, venv_name: f"/venvs/{venv_name}/bin/python"
    },
    "nemo_rl.utils.config": {
        "load_config": _load_config, "parse_hydra_overrides": _parse_hydra_overrides,
        "register_omegaconf_resolvers": lambda: None,
    },
    "ray": {"remote": lambda **options: lambda cls: cls},
}  # fmt: skip


def install() -> None:
    """Put the stand-ins in place, for this process and its forks."""
    for name, attributes in MODULES.items():
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__dict__.update(attributes)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
