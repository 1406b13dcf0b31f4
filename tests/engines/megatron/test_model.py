"""Weights in and out, for the architectures and vocabularies that users bring."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from echorl_nemo.checks.hf_config import described_config
from echorl_nemo.checks.model_build import platform_problems
from echorl_nemo.config import load_config
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.releases import maps_local_experts
from echorl_nemo.schema import RunConfig
from echorl_nemo.shipped import CONFIG_DIR
from tests.engines.megatron.helpers import LAYOUTS, PLATFORM, example_batch, prepared_batch, tiny_config, trainer_of

NEWLINE = 34

MODELS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml") if path.stem not in ("hf", "tiny-chain"))
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 44, "max_position_embeddings": 128, "moe_intermediate_size": 16,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def make_model(name: str, folder: Path, tokenizer: Path) -> dict[str, torch.Tensor]:
    """The model of conf/model/``name``.yaml with random weights, few and narrow layers, and the tiny task's tokenizer;
    everything else of its architecture is as the file has it."""
    torch.manual_seed(0)
    config = load_config("train", [f"model={name}", "data.train=x"], schema=RunConfig).model
    config.architecture |= {key: value for key, value in SMALL.items() if key in config.architecture}
    config.architecture |= {"eos_token_id": 1, "bos_token_id": 0}
    model = transformers.AutoModelForCausalLM.from_config(described_config(config))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _export_and_train(config: RunConfig, folder: Path) -> tuple[torch.Tensor, list[dict[str, float]]]:
    trainer = trainer_of(config)
    trainer.policy.model.export(folder)
    batch, _ = prepared_batch(trainer)
    assert batch.entropies is not None
    return batch.entropies, [trainer.policy.update(batch).metrics for _ in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shipped_model_comes_out_as_it_went_in(
    ranks: Callable[..., list[Any]], tiny_chain: Path, tmp_path: Path, layout: str
) -> None:
    config = tiny_config(*LAYOUTS[layout])
    ranks(world_size(config), _export_and_train, config, tmp_path / "export")
    original = load_file(tiny_chain / "model" / "model.safetensors")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[name], exported[name]) for name in original)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert model(**tokenizer("6a+7", return_tensors="pt")).logits.shape == (1, 3, 40)


def assert_scored_as_by_transformers(folder: Path, entropies: torch.Tensor) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    if hasattr(model, "set_experts_implementation"):  # transformers 5, whose grouped product has no float64
        model.set_experts_implementation("eager")
    batch = example_batch(newline=NEWLINE, eos=1)
    with torch.no_grad():
        logs = model(batch.tokens).logits[:, :-1, :36].log_softmax(dim=-1)  # tokens of the tokenizer
    expected = -(logs.exp() * logs).sum(dim=-1)
    mask = batch.response_mask[:, 1:]
    torch.testing.assert_close(entropies[:, 1:][mask].double(), expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if not re.search(r"-a\d+b$", name)])  # no mixtures
def test_every_dense_model_in_miniature(
    ranks: Callable[..., list[Any]], tiny_chain: Path, tmp_path: Path, name: str
) -> None:
    original = make_model(name, tmp_path / "model", tiny_chain / "model")
    path = f"model.path={tmp_path / 'model'}"
    ((_, on_one_rank),) = ranks(1, _export_and_train, tiny_config(path), tmp_path / "export1")
    for layout in ("TP2", "PP2", "TP2xPP2+SP"):
        config = tiny_config(*LAYOUTS[layout], path)
        (entropies, metrics), *_ = ranks(world_size(config), _export_and_train, config, tmp_path / "export")
        exported = load_file(tmp_path / "export" / "model.safetensors")
        assert original.keys() == exported.keys()
        assert all(torch.equal(original[weight], exported[weight]) for weight in original)
        assert_scored_as_by_transformers(tmp_path / "model", entropies)
        for ours, expected in zip(metrics, on_one_rank, strict=True):  # tied embeddings: gradients meet across stages
            assert ours == pytest.approx(expected, rel=1e-4, abs=1e-7)


def _train(config: RunConfig) -> tuple[torch.Tensor, list[dict[str, float]], list[str]]:
    trainer = trainer_of(config)
    batch, _ = prepared_batch(trainer)
    assert batch.entropies is not None
    generated = trainer.rollout.generate(trainer.train_data.sequence(0, 2, seed=0), 2, seed=0)
    return batch.entropies, [trainer.policy.update(batch).metrics for _ in range(2)], generated.responses


def test_a_mixture_of_experts_in_miniature(ranks: Callable[..., list[Any]], tiny_chain: Path, tmp_path: Path) -> None:
    make_model("qwen3-30b-a3b", tmp_path / "model", tiny_chain / "model")
    path = f"model.path={tmp_path / 'model'}"
    ((entropies, on_one_rank, responses),) = ranks(1, _train, tiny_config(path))
    assert_scored_as_by_transformers(tmp_path / "model", entropies)
    assert on_one_rank[0]["loss"] > on_one_rank[1]["loss"]
    for layout in ("TP2+SP", "PP2", "TP2xPP2+SP"):
        config = tiny_config(*LAYOUTS[layout], path)
        (own_entropies, metrics, own_responses), *_ = ranks(world_size(config), _train, config)
        torch.testing.assert_close(own_entropies, entropies, rtol=1e-4, atol=1e-5)
        assert own_responses == responses
        for ours, expected in zip(metrics, on_one_rank, strict=True):
            assert ours == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.skipif(maps_local_experts(), reason="this Megatron-Bridge loads and exports experts")
def test_what_a_mixture_needs_transformer_engine_for(tiny_chain: Path, tmp_path: Path) -> None:
    make_model("qwen3-30b-a3b", tmp_path / "model", tiny_chain / "model")
    config = tiny_config(f"model.path={tmp_path / 'model'}", "parallel.data=2", "parallel.expert=2")
    printed = platform_problems(config, PLATFORM)
    assert printed[0].startswith("parallel.expert=2: without Transformer Engine each rank would load the first rank's")
    assert printed[1].startswith("trainer.export=true: without Transformer Engine the experts cannot be written")
    assert platform_problems(tiny_config(), PLATFORM) == []
