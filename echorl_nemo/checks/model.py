"""Checks of the model's files, its position encoding, and its tokenizer, without loading a weight."""

import json
import math
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from echorl_nemo.checks.hf_config import read_hf_config
from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.engines.megatron.model_settings import MAPPED_FAMILIES, ROPE_TYPES, attention_settings, rope_type
from echorl_nemo.errors import UserError
from echorl_nemo.releases import saved_weights
from echorl_nemo.schema import ModelConfig

SAME_SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""Keys in which `model.architecture` and the model's own config.json must agree."""


INDEX = "model.safetensors.index.json"


FLOATS = {"F64", "F32", "F16", "BF16"}
"""Types of weights that are not quantised, as safetensors names them."""


SHOWN = 3
"""Number of weights that a message names."""


Shapes = dict[str, tuple[int, ...]]


def read_tokenizer(model: ModelConfig) -> Tokenizer:
    """Load the tokenizer of `model.path` with the settings of `model`. Raises UserError if it cannot be used."""
    return Tokenizer(
        model.path,
        trust_remote_code=model.trust_remote_code,
        chat_template=model.chat_template,
        stop_tokens=model.stop_tokens,
        keep_special_tokens=model.keep_special_tokens,
        verify=model.verify == "auto",
    )


def path_problems(model: ModelConfig) -> list[str]:
    """Problems if the model at `model.path` cannot be read, or is not the one that `model.architecture` describes."""
    try:
        own = read_hf_config(model)
    except UserError as error:
        return [str(error)]
    return [
        f"model.path={model.path}: its config.json has {name}={getattr(own, name, None)}, model.architecture "
        f"{model.architecture[name]}; choose the model= that goes with the path, or model=hf"
        for name in SAME_SIZES
        if name in model.architecture and getattr(own, name, None) != model.architecture[name]
    ]


def position_encoding_problems(hf_config: PretrainedConfig, path: str) -> list[str]:
    """A problem if the native engine does not support the position encoding in ``hf_config``, such as its RoPE scaling.
    ``path``: the value of `model.path`, for the message."""
    kind = rope_type(hf_config)
    if hf_config.model_type not in MAPPED_FAMILIES:
        return []
    if kind in ROPE_TYPES:
        settings = attention_settings(hf_config)
        assert settings is not None
        sound = bool((settings.inverse_frequencies > 0).all() and settings.inverse_frequencies.isfinite().all())
        if sound and math.isfinite(settings.scale) and settings.scale > 0:
            return []
        return [f"model.path={path}: its rope_scaling gives frequencies that are not positive; correct its config.json"]
    return [
        f"model.path={path}: its config.json has rope_scaling of type {kind!r}, which this engine does not have; use a "
        f"model with one of {', '.join(ROPE_TYPES)}"
    ]


def weight_problems(model: ModelConfig, hf_config: PretrainedConfig) -> list[str]:
    """Problems with the safetensors files of `model.path`: damaged, missing or quantised weights, or shapes other than
    those of config.json. A model on the hub is not looked at."""
    folder = Path(model.path)
    if not folder.is_dir():
        return []
    held, problems = _held_shapes(folder)
    if problems:
        return [f"model.path={model.path}: {problem}" for problem in problems]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=model.trust_remote_code)
    wanted = {name: tuple(weight.shape) for name, weight in saved_weights(skeleton).items()}
    optional = set(getattr(skeleton, "_tied_weights_keys", None) or []) if hf_config.tie_word_embeddings else set()
    other = [
        f"{name} has shape {list(held[name])}, config.json asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in held and held[name] != shape
    ]
    missing = [name for name in wanted if name not in held and name not in optional]
    further = [name for name in held if name not in wanted and not name.endswith("inv_freq")]
    if hf_config.tie_word_embeddings and _heads_differ(folder, held):
        other.append("tie_word_embeddings=true, and the embedding and lm_head.weight are different weights")
    if missing:
        other.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if further:
        other.append(f"config.json has no place for {_some(further)}")
    if not other:
        return []
    return [f"model.path={model.path}: {'; '.join(other[:SHOWN])}; use the config.json that goes with the weights"]


def vocabulary_problems(model: ModelConfig, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """A problem if the tokenizer has ids that are not less than ``vocab_size``, the rows of the embedding."""
    special = {
        "its pad token": tokenizer.hf.pad_token_id,
        "its bos token": tokenizer.hf.bos_token_id,
        "its eos token": tokenizer.hf.eos_token_id,
        "a stop token": max(tokenizer.stop_ids),
        "the last of its tokens": len(tokenizer) - 1,
    }
    beyond = [f"{what} has id {number}" for what, number in special.items() if (number or 0) >= vocab_size]
    if not beyond:
        return []
    return [
        f"model.path={model.path}: the embedding has {vocab_size} rows (vocab_size of config.json), and of the "
        f"tokenizer {', '.join(beyond)}; use the tokenizer that goes with the model"
    ]


def prompt_token_problems(data: PromptData, vocab_size: int, field: str) -> list[str]:
    """A problem if a prompt has a token id that is not less than ``vocab_size``, the rows of the embedding. ``field``:
    the configuration key of ``data``, for the message."""
    if data.largest_id < vocab_size:
        return []
    return [
        f"{field}: a prompt holds token {data.largest_id}, the embedding has {vocab_size} rows; use the tokenizer that "
        "goes with the model"
    ]


def _heads_differ(folder: Path, held: Shapes) -> bool:
    """Whether a folder holds an output layer that differs from its embedding. Only the first rows are compared."""
    names = [name for name in held if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if len(names) != 2:
        return False
    rows: list[torch.Tensor] = []
    for file in _weight_files(folder)[0]:
        with safetensors.safe_open(file, "pt") as weights:
            rows += [weights.get_slice(name)[:64] for name in names if name in weights.keys()]  # noqa: SIM118
    return len(rows) == 2 and not torch.equal(*rows)


def _held_shapes(folder: Path) -> tuple[Shapes, list[str]]:
    """The shape of every weight of a folder, and the problems of its files."""
    files, problems = _weight_files(folder)
    shapes: Shapes = {}
    for file in files:
        kinds = {}
        try:
            with safetensors.safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  it is not a dictionary
                    part: Any = weights.get_slice(name)
                    shapes[name], kinds[name] = tuple(part.get_shape()), part.get_dtype()
        except (safetensors.SafetensorError, OSError) as error:
            problems.append(f"{file.name} is damaged ({error}); copy the model again")
            continue
        if quantised := [name for name, kind in kinds.items() if kind not in FLOATS]:
            kind = kinds[quantised[0]]
            problems.append(f"{file.name} holds {quantised[0]} as {kind}; use weights that are not quantised")
    return shapes, problems


def _weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of the model, and a problem for each one that is missing."""
    index, files = folder / INDEX, sorted(folder.glob("*.safetensors"))
    if not index.is_file():
        missing = "there is no .safetensors file; convert the weights with transformers' save_pretrained"
        return files, [] if files else [missing]
    try:
        listed = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [], [f"{INDEX} cannot be read ({error!r}); copy the model again"]
    there = [folder / name for name in sorted(listed) if (folder / name).is_file()]
    gone = sorted(listed - {file.name for file in there})
    return there, [f"{name} is missing, {INDEX} names it; copy the model again" for name in gone]


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
