"""Weights in and out, for the architectures and vocabularies that users bring."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, example_batch, prepared_batch, tiny_config, trainer_of

NEWLINE = 34

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 1,
}  # fmt: skip


def make_model(kind: str, folder: Path, tokenizer: Path) -> dict[str, torch.Tensor]:
    """A random model with the tiny task's tokenizer."""
    torch.manual_seed(0)
    settings = {**SHAPE, "vocab_size": 44, "tie_word_embeddings": kind == "qwen2-tied"}
    model = {
        "qwen2-tied": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings, head_dim=8)),
    }[kind]()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _export_and_train(config: RunConfig, folder: Path) -> tuple[torch.Tensor, list[dict[str, float]]]:
    trainer = trainer_of(config)
    trainer.policy.model.export(folder)
    batch, _ = prepared_batch(trainer)
    assert batch.entropies is not None
    return batch.entropies, [trainer.policy.update(batch) for _ in range(2)]


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "TP2xPP2"])
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


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama", "qwen3"])
def test_architectures(ranks: Callable[..., list[Any]], tiny_chain: Path, tmp_path: Path, kind: str) -> None:
    original = make_model(kind, tmp_path / "model", tiny_chain / "model")
    config = tiny_config(*LAYOUTS["TP2xPP2"], f"model.path={tmp_path / 'model'}")
    (entropies, metrics), *_ = ranks(4, _export_and_train, config, tmp_path / "export")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[name], exported[name]) for name in original)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    batch = example_batch(newline=NEWLINE, eos=1)
    with torch.no_grad():
        logs = model(batch.tokens).logits[:, :-1].log_softmax(dim=-1)
    expected = -(logs.exp() * logs).sum(dim=-1)
    mask = batch.response_mask[:, 1:]
    torch.testing.assert_close(entropies[:, 1:][mask].double(), expected[mask], rtol=1e-5, atol=1e-5)

    config = tiny_config(f"model.path={tmp_path / 'model'}")
    ((_, on_one_rank),) = ranks(1, _export_and_train, config, tmp_path / "export1")
    for ours, expected in zip(metrics, on_one_rank, strict=True):  # tied embeddings: their gradients meet across stages
        assert ours == pytest.approx(expected, rel=1e-4)
