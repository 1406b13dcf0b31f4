"""Damaged models and tokenizers: one line each, before a rank starts."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from echorl_nemo.checks.commands import checked_inputs
from echorl_nemo.errors import UserError
from tests.engines.megatron.families import TINY_CHAIN, make_model
from tests.engines.megatron.helpers import PLATFORM, tiny_config

Damage = Callable[[Path], None]


def problems_of(path: Path, *overrides: str) -> list[str]:
    """Every problem of a run of the model at ``path``; none if it may start."""
    config = tiny_config(f"model.path={path}", "data.eval=null", *overrides)
    try:
        checked_inputs(config, PLATFORM)
    except UserError as error:
        return str(error).splitlines()
    return []


def changed(file: str, **changes: Any) -> Damage:
    """A change of a JSON file's top-level keys; None removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content |= changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(content))

    return damage


def written(file: str, content: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_text(content)

    return damage


def removed(*files: str) -> Damage:
    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink(missing_ok=True)

    return damage


def both(first: Damage, second: Damage) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


def truncated(file: str) -> Damage:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _two_shards_of_three(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(held, folder / "one.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(held, "one.safetensors") | {"lm_head.weight": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (removed("config.json"), "no Hugging Face model can be read"),
    "config is no JSON": (written("config.json", "{oops"), "no Hugging Face model can be read"),
    "config is a list": (written("config.json", "[1]"), "no Hugging Face model can be read"),
    "unknown model_type": (changed("config.json", model_type="qwen9"), "no Hugging Face model can be read"),
    "another width": (changed("config.json", hidden_size=96), "model.embed_tokens.weight has shape [40, 64]"),
    "another vocabulary": (changed("config.json", vocab_size=64), "config.json asks for [64, 64]"),
    "too many layers": (changed("config.json", num_hidden_layers=3, layer_types=None), "are missing"),
    "too few layers": (changed("config.json", num_hidden_layers=1, layer_types=None), "config.json has no place for"),
    "heads as a text": (changed("config.json", num_attention_heads="four"), "num_attention_heads='four'; correct it"),
    "no heads": (changed("config.json", num_attention_heads=0), "num_attention_heads=0; correct it"),
    "truncated weights": (truncated("model.safetensors"), "model.safetensors is damaged"),
    "empty weights": (written("model.safetensors", ""), "model.safetensors is damaged"),
    "no weights": (removed("model.safetensors"), "there is no .safetensors file"),
    "a shard is missing": (_two_shards_of_three, "two.safetensors is missing, model.safetensors.index.json names it"),
    "index is no JSON": (written("model.safetensors.index.json", "{"), "model.safetensors.index.json cannot be read"),
    "a weight is missing": (weights(lambda held: held.pop("model.norm.weight")), "model.norm.weight is missing"),
    "a weight too many": (weights(lambda held: held.update(extra=torch.ones(2))), "has no place for extra"),
    "quantised": (
        weights(lambda held: held.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})), "as I8; use",
    ),
    "unknown rope": (
        changed("config.json", rope_scaling={"rope_type": "spiral", "factor": 2.0}), "rope_scaling of type 'spiral'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_malformed_model(tmp_path: Path, name: str) -> None:
    damage, message = MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(TINY_CHAIN / "model", folder)
    assert problems_of(folder) == []
    damage(folder)
    found = problems_of(folder)
    assert len(found) == 1 and message in found[0] and str(folder) in found[0], found


def _ids_beyond(folder: Path) -> None:
    """The embedding of 16 rows: the tokenizer has 36 ids."""
    make_model("llama", folder, vocab_size=16)


def _vocabulary(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def _other_class(folder: Path) -> None:
    """A class that replaces the tokenizer's own way of splitting, as transformers chooses by names in other files."""
    changed("tokenizer_config.json", tokenizer_class="T5Tokenizer")(folder)


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "no file": (
        removed("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"), "no tokenizer can be read",
    ),
    "truncated": (truncated("tokenizer.json"), "no tokenizer can be read"),
    "no JSON": (written("tokenizer.json", "{oops"), "no tokenizer can be read"),
    "another JSON": (written("tokenizer.json", '{"a": 1}'), "no tokenizer can be read"),
    "empty": (written("tokenizer.json", ""), "no tokenizer can be read"),
    "config is no JSON": (written("tokenizer_config.json", "{oops"), "no tokenizer can be read"),
    "unknown model": (_vocabulary(lambda content: content["model"].update(type="Magic")), "no tokenizer can be read"),
    "no end of sequence": (
        both(changed("tokenizer_config.json", eos_token=None), changed("special_tokens_map.json", eos_token=None)),
        "the tokenizer has no eos_token",
    ),
    "ids beyond the embedding": (_ids_beyond, "the embedding has 16 rows"),
    "generation config is no JSON": (written("generation_config.json", "{"), "generation_config.json cannot be read"),
    "stop token beyond the embedding": (
        changed("generation_config.json", eos_token_id=[1, 99]), "a stop token has id 99",
    ),
    "another class": (_other_class, "model.path="),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_malformed_tokenizer(tmp_path: Path, name: str) -> None:
    damage, message = TOKENIZERS[name]
    folder = tmp_path / "model"
    shutil.copytree(TINY_CHAIN / "model", folder)
    damage(folder)
    found = problems_of(folder)
    assert found and message in found[0] and str(folder) in found[0], found
    assert len(found) <= 2  # that of "another class" may lack a package, too


@pytest.mark.parametrize(
    "name",
    [
        "llama-longrope", "llama-bias", "gemma", "gemma2", "gemma3", "nemotron", "deepseek-v2", "deepseek-v3", "glm4",
        "glm4-moe", "phi3", "smollm3",
    ],
)  # fmt: skip
def test_an_architecture_that_cannot_be_built_here(tmp_path: Path, name: str) -> None:
    folder = make_model(name, tmp_path / "model")
    found = problems_of(folder, "trainer.export=false")
    assert len(found) == 1 and found[0].startswith(f"model.path={folder}: "), found


@pytest.mark.parametrize("name", ["llama-yarn", "qwen2-window", "mistral-window", "qwen3-moe"])
def test_an_architecture_that_can(tmp_path: Path, name: str) -> None:
    assert problems_of(make_model(name, tmp_path / "model"), "trainer.export=false") == []
