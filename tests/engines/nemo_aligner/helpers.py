"""A GRPO actor and trainer on the tiny task, on ranks that a test started."""

import os
from pathlib import Path
from typing import Any

from echorl_nemo.engines.nemo_aligner import cpu

cpu.install_stand_ins()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from echorl_nemo.engines.nemo_aligner.run import make_trainer  # noqa: E402
from echorl_nemo.engines.nemo_aligner.trainer import EchoGRPOTrainer  # noqa: E402
from examples.nemo_aligner.make_tiny_nemo import write_nemo  # noqa: E402

CONFIG_DIR = Path(__file__).resolve().parents[3] / "conf" / "nemo_aligner"

LAYOUTS = {
    "TP1": (1, []),
    "TP2": (2, ["model.tensor_model_parallel_size=2"]),
    "PP2": (2, ["model.pipeline_model_parallel_size=2"]),
    "TP2xPP2": (4, ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]),
    "DP2": (2, []),
}
"""Ranks and overrides of each parallel layout that is tested."""


def write_tiny_nemo(path: Path) -> None:
    _as_torchrun_would()
    write_nemo(path)


def tiny_config(nemo: Path, folder: Path, *overrides: str) -> DictConfig:
    """conf/nemo_aligner/tiny_chain.yaml, smaller, without checkpoints."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose(
            "tiny_chain",
            overrides=[
                f"pretrained_checkpoint.restore_from_path={nemo}",
                f"exp_manager.explicit_log_dir={folder}",
                "exp_manager.create_checkpoint_callback=false",
                "+exp_manager.create_tensorboard_logger=false",
                "trainer.grpo.val_check_interval=0",
                "model.grpo.num_rollout_samples=8",
                "model.grpo.rollout_micro_batch_size=4",
                "model.grpo.forward_micro_batch_size=4",
                "model.global_batch_size=16",
                "model.micro_batch_size=4",
                *overrides,
            ],
        )


def trainer_of(config: DictConfig) -> EchoGRPOTrainer:
    """On a rank: the trainer of ``config``."""
    _as_torchrun_would()
    config.trainer.devices = dist.get_world_size()
    return make_trainer(config)


def _as_torchrun_would() -> None:
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


class Records:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None, prefix: str = "") -> None:
        self.metrics.append((prefix, dict(metrics)))

    def log_table(self, *args: Any, **kwargs: Any) -> None: ...

    def finalize(self) -> None: ...

    def of(self, prefix: str) -> list[dict[str, Any]]:
        return [metrics for kind, metrics in self.metrics if kind == prefix]


def example_batch(newline: int, eos: int, *, vocabulary: int, seed: int = 11) -> dict[str, torch.Tensor]:
    """16 random rollouts of 4 groups as `get_loss_and_metrics` takes them, off-policy, with clips of some successes."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = 16, 30
    prompt = torch.tensor([5, 9, 7, 12]).repeat_interleave(4)
    length = prompt + torch.randint(2, 18, (rows,), generator=generator)
    tokens = torch.randint(3, vocabulary, (rows, width), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = newline
    positions = torch.arange(width).expand(rows, -1)
    tokens[positions >= length[:, None]] = eos
    mask = ((positions >= prompt[:, None]) & (positions < length[:, None]))[:, 1:]
    advantages = torch.randn(rows, generator=generator)
    advantages[:4] = 0.0
    clips = mask & (torch.arange(1, width) < prompt[:, None] + 4)
    clips[[1, 6, 9, 10, 11, 12, 13, 14, 15]] = False
    return {
        "response_tokens": tokens,
        "mask": mask,
        "clip_weight": clips / clips.sum(dim=1, keepdim=True).clamp(min=1),
        "advantages": advantages,
        "counted": torch.arange(rows) >= 4,
        "old_logprobs": torch.where(mask, -3 + 0.3 * torch.randn(rows, width - 1, generator=generator), 0.0),
    }
