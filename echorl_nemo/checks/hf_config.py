"""Reads the configuration of a Hugging Face model, and refuses one with impossible values."""

import sys
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from echorl_nemo.errors import UserError, first_line
from echorl_nemo.ops.ranges import Interval
from echorl_nemo.releases import rope_settings
from echorl_nemo.schema import ModelConfig

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
"""Keys of a config.json that are whole numbers of at least 1, if they are there."""


NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys that every model has."""


NUMBERS = {
    "rms_norm_eps": Interval("(0, 1)"),
    "layer_norm_eps": Interval("(0, 1)"),
    "attention_dropout": Interval("[0, 1)"),
    "sliding_window": Interval("[1, 1e9]"),
    "partial_rotary_factor": Interval("(0, 1]"),
}


ROPE = {
    "rope_theta": Interval("(0, 1e12]"),
    "factor": Interval("(0, 1e6]"),
    "low_freq_factor": Interval("(0, 1e6]"),
    "high_freq_factor": Interval("(0, 1e6]"),
    "original_max_position_embeddings": Interval("[1, 1e9]"),
    "attention_factor": Interval("(0, 1e6]"),
}
"""Ranges of the numbers that attention is computed with, if they are there; `ROPE`: of its position embedding."""


def known_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration that `model.architecture` describes, or that of `model.path`. Raises UserError if there is
    none."""
    return described_config(model) if model.architecture else read_hf_config(model)


def read_hf_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration of the model at `model.path`. Raises UserError if there is none, or one with impossible
    sizes."""
    try:
        hf_config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises anything for a damaged config.json
        words = first_line(error)
        cause = words if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {words}"
        raise UserError(
            f"model.path={model.path}: no Hugging Face model can be read: {cause} Name a folder that holds it, or an "
            "id of the hub where the hub can be reached"
        ) from error
    if wrong := [f"{name}={value!r}" for name, value in _impossible(hf_config)]:
        raise UserError(f"model.path={model.path}: its config.json has {', '.join(wrong)}; correct it")
    return hf_config


def described_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration that `model.architecture` describes. Raises UserError for an unknown architecture."""
    values: dict[str, Any] = dict(model.architecture)
    try:
        return AutoConfig.for_model(values.pop("model_type", ""), **values)
    except ValueError as error:
        raise UserError(
            f"model.architecture: {str(error).splitlines()[0]}; give model_type and architectures"
        ) from error


def number_of_experts(hf_config: PretrainedConfig) -> int:
    """Number of experts in a layer; 0 for a dense model."""
    return int(getattr(hf_config, "num_experts", None) or getattr(hf_config, "num_local_experts", None) or 0)


def positions(model: ModelConfig) -> int | None:
    """Largest number of positions of the model; None if it has no limit, or cannot be read, which is reported
    elsewhere."""
    try:
        return getattr(read_hf_config(model), "max_position_embeddings", None)
    except UserError:
        return None


def vocab_size(model: ModelConfig) -> int:
    """Rows of the model's embedding; a very large number if they cannot be read, which is reported elsewhere."""
    try:
        return int(getattr(read_hf_config(model), "vocab_size", sys.maxsize))
    except UserError:
        return sys.maxsize


def _impossible(hf_config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Iterate over names and values of a configuration that no model can have."""
    for name in SIZES:
        value = getattr(hf_config, name, 1)
        missing = value is None and name in NEEDED
        if missing or (value is not None and (type(value) is not int or value < 1)):
            yield name, value
    for name, interval in NUMBERS.items():
        value = getattr(hf_config, name, None)
        if value is not None and value not in interval:
            yield name, value
    for name, value in rope_settings(hf_config).items():
        if name in ROPE and value is not None and value not in ROPE[name]:
            yield name if name == "rope_theta" else f"rope_scaling.{name}", value
