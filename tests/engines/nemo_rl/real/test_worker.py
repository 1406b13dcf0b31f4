"""NeMo-RL's real Megatron worker with ours on top, in gloo ranks, against transformers with torch's AdamW."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engines.nemo_rl.real import NEEDED, PRESENT

pytestmark = pytest.mark.skipif(not PRESENT, reason=NEEDED)

ROLLOUTS, WIDTH, COEF, STEPS = 4, 24, 0.1, 2
LENGTHS = [24, 17, 24, 9]
PACKING = "modified_first_fit_decreasing"
PACKED = {"enabled": True, "train_mb_tokens": 64, "logprob_mb_tokens": 64}


@pytest.fixture
def settings(tmp_path: Path, tiny_chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of tiny.yaml, and a port for Megatron."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny_chain / "model" / file, tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {
        "TINY": str(tiny_chain), "TINY_TOKENIZER": str(tokenizer), "RUN_DIR": str(tmp_path), "MASTER_PORT": port,
        "NRL_MEGATRON_CHECKPOINT_DIR": str(tmp_path / "mcore"), "MASTER_ADDR": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def batch(**columns: Tensor) -> Any:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(WIDTH) < lengths[:, None]).float()
    ids = torch.randint(2, 40, (ROLLOUTS, WIDTH), generator=generator) * mask.long()
    return BatchedDataDict(
        {
            "input_ids": ids, "input_lengths": lengths, "token_mask": mask, "sample_mask": torch.ones(ROLLOUTS),
            **columns,
        }
    )  # fmt: skip


def _train(tensor: int, pipeline: int, packed: bool) -> dict[str, Any]:
    """What the worker of this rank gives: scores, then two updates with no advantage, then scores again."""
    import numpy as np
    import ray
    import torch.distributed as dist
    from nemo_rl.algorithms.loss import ClippedPGLossConfig
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.distributed.named_sharding import NamedSharding
    from nemo_rl.models.generation import configure_generation_config
    from nemo_rl.utils.config import load_config, register_omegaconf_resolvers
    from omegaconf import OmegaConf

    from echorl_nemo.engines.nemo_rl.loss import EchoClippedPGLossFn
    from echorl_nemo.engines.nemo_rl.worker import EchoMegatronPolicyWorkerImpl

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    ray.get_gpu_ids = lambda: [rank]
    register_omegaconf_resolvers()
    config: Any = OmegaConf.to_container(load_config(str(Path(__file__).with_name("tiny.yaml"))), resolve=True)
    policy, tokenizer = config["policy"], get_tokenizer(config["policy"]["tokenizer"])
    policy["generation"] = configure_generation_config(policy["generation"], tokenizer)
    policy["megatron_cfg"] |= {
        "train_iters": 10, "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline,
    }  # fmt: skip
    policy["make_sequence_length_divisible_by"] = tensor
    if packed:
        policy["sequence_packing"] |= PACKED | {
            "algorithm": "modified_first_fit_decreasing",
            "sequence_length_round": 8,
        }
    layout = NamedSharding(
        layout=np.arange(tensor * pipeline).reshape(pipeline, 1, 1, tensor),
        names=["pipeline_parallel", "data_parallel", "context_parallel", "tensor_parallel"],
    )
    worker = EchoMegatronPolicyWorkerImpl(
        policy, tokenizer, worker_sharding_annotations=layout, init_reference_model=False,
        pre_init_communication_queue=None,
    )  # fmt: skip

    def score() -> Any:
        worker.prepare_for_lp_inference()
        data, order = micro_batches(batch(), packed)
        scored = worker.get_logprobs(data=data)
        scored.reorder_data(order)
        return scored

    before = score()
    loss_fn = EchoClippedPGLossFn(ClippedPGLossConfig(**{**config["loss_fn"], "echorl": {"coef": COEF}}))
    zeros = torch.zeros(ROLLOUTS, WIDTH)
    columns = dict.fromkeys(("prev_logprobs", "generation_logprobs"), before["logprobs"])
    data = batch(advantages=zeros, echo_weight=weights(), reference_policy_logprobs=zeros, **columns)
    worker.prepare_for_training()
    data, _ = micro_batches(data, packed)
    updates = [worker.train(data=data, loss_fn=loss_fn, gbs=ROLLOUTS, mbs=2) for _ in range(STEPS)]
    after = score()
    return {
        "logprobs": before["logprobs"], "entropies": before["entropies"], "after": after["logprobs"],
        "grad_norm": [float(update["grad_norm"]) for update in updates],
        "clip_loss": [sum(update["all_mb_metrics"].get("echorl/clip_loss", [])) for update in updates],
    }  # fmt: skip


def micro_batches(data: Any, packed: bool) -> tuple[Any, list[int]]:
    """The shard of the only data-parallel rank as NeMo-RL's driver makes it, with the bins of packed rows, and the row
    of each of its rollouts."""
    if not packed:
        return data, list(range(ROLLOUTS))
    arguments = {
        "algorithm": PACKING, "input_key": "input_ids", "input_lengths_key": "input_lengths",
        "sequence_length_pad_multiple": 8, "max_tokens_per_microbatch": PACKED["train_mb_tokens"],
    }  # fmt: skip
    [shard], order = data.shard_by_batch_size(1, batch_size=ROLLOUTS, sequence_packing_args=arguments)
    return shard, order


def weights() -> Tensor:
    """Of the first two rollouts' responses, each token 1: the mean over the valid tokens of the batch."""
    chosen = torch.zeros(ROLLOUTS, WIDTH)
    chosen[:2, 1:] = 1.0
    return chosen * batch()["token_mask"]


def by_transformers(model_path: Path) -> dict[str, Any]:
    """The same scores and updates by the Hugging Face model and torch's AdamW, as Megatron's settings say."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    ids, mask = batch()["input_ids"], batch()["token_mask"]

    def logs() -> Tensor:
        return torch.nn.functional.pad(model(ids).logits.log_softmax(dim=-1)[:, :-1], (0, 0, 1, 0))

    def logprobs() -> Tensor:
        return logs().gather(-1, ids[..., None]).squeeze(-1)

    result: dict[str, Any] = {"grad_norm": [], "clip_loss": []}
    with torch.no_grad():
        result |= {"logprobs": logprobs(), "entropies": -(logs().exp() * logs()).sum(dim=-1)}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = -(weights() * logprobs()).sum() / mask[:, 1:].sum()
        (COEF * loss).backward()
        result["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        result["clip_loss"].append(float(loss))
        optimizer.step()
    with torch.no_grad():
        result["after"] = logprobs()
    return result


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    ("tensor", "pipeline", "packed"),
    [(1, 1, False), (2, 1, False), (1, 2, False), (1, 1, True), (2, 1, True), (1, 2, True)],
)
def test_the_worker_scores_and_trains_like_transformers(
    tensor: int, pipeline: int, packed: bool, ranks: Callable[..., list[Any]], tiny_chain: Path
) -> None:
    expected = by_transformers(tiny_chain / "model")
    results = ranks(tensor * pipeline, _train, tensor, pipeline, packed)
    seen = batch()["token_mask"].bool() & (torch.arange(WIDTH) > 0)
    for result in results:
        for name, bound in (("logprobs", 3e-5), ("entropies", 3e-5), ("after", 3e-4)):
            gap = float((result[name] - expected[name])[seen].abs().max())
            assert gap < bound, name
        assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert results[-1]["clip_loss"] == pytest.approx(expected["clip_loss"], rel=1e-4)
