"""Position encodings and attention windows, which Megatron-Bridge 0.3.1 maps wrongly or not at all.

They are read from the Hugging Face configuration by transformers' own functions and set on Megatron's model. Without
this a model with YaRN, linear or Llama-3 scaling, or with a sliding window, trains on log-probs that are wrong by
nats, without an error (llama_bridge.py, mistral_bridge.py, qwen2_bridge.py of that release).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from echorl_nemo.releases import inverse_frequencies, rope_settings

MAPPED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Architectures whose attention `AttentionSettings` describes completely."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Kinds of rotary position embedding that can be set: their frequencies are fixed up to the model's last position."""


@dataclass(frozen=True)
class AttentionSettings:
    """A model's position encoding, attention scale, attention windows, and routing of experts."""

    inverse_frequencies: Tensor
    """[head width / 2] float32: the inverse frequencies of the rotary position embedding."""
    scale: float
    """Factor by which the attention logits are multiplied."""
    windows: tuple[int | None, ...]
    """For each layer the number of tokens that a token attends to, itself included; None: all tokens before it."""
    experts_renormalised: bool | None
    """Whether the weights of a token's experts add up to 1; None for a dense model."""

    @property
    def window(self) -> int | None:
        """The attention window of the layers that have one; None if no layer has. A model has one size of window."""
        return next((window for window in self.windows if window is not None), None)


def rope_type(hf_config: PretrainedConfig) -> str:
    """The kind of rotary position embedding, under transformers' name."""
    return str(rope_settings(hf_config)["rope_type"])


def attention_settings(hf_config: PretrainedConfig) -> AttentionSettings | None:
    """The attention settings of a model; None if its architecture is not one of `MAPPED_FAMILIES`."""
    if hf_config.model_type not in MAPPED_FAMILIES:
        return None
    frequencies, factor = inverse_frequencies(hf_config)
    width = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    # transformers multiplies cosine and sine, of queries and of keys, with the factor
    scale = factor**2 / math.sqrt(width)
    experts = hf_config.norm_topk_prob if hf_config.model_type == "qwen3_moe" else None
    return AttentionSettings(frequencies.float(), scale, tuple(attention_windows(hf_config)), experts)


def apply_to_provider(provider: Any, settings: AttentionSettings) -> None:
    """Set scale, windows and the routing of experts on a Megatron-Bridge provider, before the model is built."""
    if settings.experts_renormalised is not None:
        provider.moe_router_pre_softmax = not settings.experts_renormalised
    provider.position_embedding_type = "rope"
    provider.rope_scaling = False  # `set_inverse_frequencies` sets the scaled frequencies
    provider.seq_len_interpolation_factor = None
    for name in [name for name in vars(provider) if name.startswith("yarn_")]:
        delattr(provider, name)  # Megatron would scale queries and keys once more
    provider.softmax_scale = settings.scale
    provider.window_size = provider.window_attn_skip_freq = None
    if settings.window is not None:
        provider.window_size = megatron_window(settings.window)
        provider.window_attn_skip_freq = [int(window is not None) for window in settings.windows]


def set_inverse_frequencies(module: Any, settings: AttentionSettings) -> None:
    """Set the inverse frequencies of Megatron's rotary embeddings. Call it before their first use, which caches
    them."""
    for rotary in rotary_embeddings(module):
        rotary.inv_freq = settings.inverse_frequencies.to(rotary.inv_freq.device)


def rotary_embeddings(module: Any) -> Iterator[Any]:
    """Iterate over the modules of a model that hold inverse frequencies."""
    return (each for each in module.modules() if isinstance(getattr(each, "inv_freq", None), Tensor))


def megatron_window(window: int) -> tuple[int, int]:
    """An attention window in Megatron's form: Megatron does not count the current token, transformers does."""
    return (window - 1, 0)


def attention_windows(hf_config: PretrainedConfig) -> Iterator[int | None]:
    """For each layer the number of tokens that a token attends to, itself included; None: all tokens before it."""
    window = getattr(hf_config, "sliding_window", None)
    kinds = getattr(hf_config, "layer_types", None) or ["sliding_attention"] * hf_config.num_hidden_layers
    for kind in kinds:
        yield window if window and kind == "sliding_attention" else None
