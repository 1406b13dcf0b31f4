"""Models in miniature of several architectures, with random weights and the embedded task's tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conftest import REPOSITORY

TINY_CHAIN = REPOSITORY / "examples" / "tiny_chain" / "made"
SIZES: dict[str, Any] = {
    "vocab_size": 40,  # four more than the tokenizer has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "initializer_range": 0.15,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MIXED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN}),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen3-yarn": ("Qwen3", {"rope_scaling": YARN, "head_dim": 32}),
    "qwen2-window": ("Qwen2", WINDOW),
    "qwen3-window": ("Qwen3", {**WINDOW, "head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "qwen3-moe-plain": ("Qwen3Moe", {**MOE, "norm_topk_prob": False}),
    # what this engine cannot build or import on a CPU
    "llama-longrope": (
        "Llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0}},
    ),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "nemotron": ("Nemotron", {}),
    "deepseek-v2": (
        "DeepseekV2", {**MIXED, **LATENT, "n_shared_experts": 1, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "deepseek-v3": (
        "DeepseekV3", {**MIXED, **LATENT, "n_shared_experts": 1, "q_lora_rank": 24, "n_group": 1, "topk_group": 1},
    ),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4-moe": ("Glm4Moe", {**MIXED, "head_dim": 16, "n_shared_experts": 1}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {}),
}  # fmt: skip
"""By name, transformers' prefix of the classes and what differs from `SIZES`."""


def make_model(name: str, folder: Path, **changes: Any) -> Path:
    """Write the model ``name`` to ``folder``, with ``changes`` to its configuration."""
    prefix, settings = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **settings, **changes})
    causal = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    causal(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY_CHAIN / "model" / file, folder / file)
    return folder
