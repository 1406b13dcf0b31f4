"""Makes the archives in data/: checkpoints of a very small model, each written by another release of Megatron-Core.

    python -m tests.engines.megatron.release_checkpoints

writes the one of the installed release. It holds the model, the checkpoint after two steps, the metrics of the third
step as that release made it, and the exported weights.
"""

import importlib.metadata
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conftest import REPOSITORY
from tests.engines.megatron.helpers import run_to_end, tiny_config
from tests.ranks import run_ranks

DATA = Path(__file__).parent / "data"
STEPS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def run_overrides(*overrides: str) -> list[str]:
    """The run in the working directory, which holds `model` and `examples`."""
    return [
        "model.path=model", "data.train=examples/tiny_chain/made/train.jsonl", "data.eval=null",
        "trainer.run_dir=run", f"trainer.steps={STEPS}", "trainer.save_every=1", "trainer.minibatch_prompts=2",
        "trainer.lr=1e-2", "rollout.max_new_tokens=8", "logger.tensorboard=false", "checkpoint.keep_last=2",
        "algo.degenerate=zvp", "algo.zvp_alpha=0.5", *overrides,
    ]  # fmt: skip


def train(*overrides: str) -> int:
    """On a rank: the run to its end."""
    return run_to_end(tiny_config(*run_overrides(*overrides)))


def metrics_of_last_step() -> dict[str, Any]:
    """The metrics of the last step in the working directory, without times."""
    row = json.loads((Path("run") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {name: value for name, value in row.items() if not name.startswith(("time", "tokens_per_second"))}


def _make() -> None:
    examples = REPOSITORY / "examples"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("examples").symlink_to(examples)
        torch.manual_seed(0)
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).save_pretrained("model")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(examples / "tiny_chain" / "made" / "model" / name, Path("model") / name)
        run_ranks(1, train)
        metrics = json.dumps(metrics_of_last_step(), indent=1)
        (Path("run") / "last_step.json").write_text(metrics + "\n", encoding="utf-8")
        release = importlib.metadata.version("megatron-core")
        DATA.mkdir(exist_ok=True)
        with tarfile.open(DATA / f"core-{release}.tar.xz", "w:xz") as archive:
            for name in ("model", "run/checkpoints/step-000002", "run/last_step.json", "run/export/model.safetensors"):
                archive.add(name, filter=_without_owner)


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


if __name__ == "__main__":
    _make()
