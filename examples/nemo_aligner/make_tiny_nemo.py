"""The tiny chain model as a .nemo file, so that the example trains on a machine without a GPU.

    .venv-aligner/bin/python examples/nemo_aligner/make_tiny_nemo.py runs/tiny_chain.nemo

Converts the shipped Hugging Face folder (Qwen2 architecture) on one CPU rank. Models of any size are converted with the
scripts that come with NeMo, see docs/nemo_aligner.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from echorl_nemo.engines.nemo_aligner import cpu

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "tiny_chain" / "made" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .nemo file")
    args = parser.parse_args()
    cpu.install_stand_ins()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_nemo(args.out)
    print(args.out)


def write_nemo(path: Path) -> None:
    """Build the model on this process as the only rank, take over the weights and save."""
    from lightning.pytorch import Trainer
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
    from nemo_aligner.utils.train_script_utils import init_distributed, resolve_and_create_trainer
    from safetensors.torch import load_file

    shape = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    config = OmegaConf.create(
        {
            "model": model_config(shape),
            "exp_manager": None,
            "trainer": {
                "accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": 32, "logger": False,
                "enable_checkpointing": False, "use_distributed_sampler": False, "max_steps": 1, "conversion": {},
            },
        }
    )  # fmt: skip
    trainer: Trainer = resolve_and_create_trainer(config, "conversion")
    model = MegatronGPTModel(config.model, trainer)
    model.setup_complete = True
    init_distributed(trainer, model)
    module: Any = model.model
    weights = megatron_weights(load_file(FOLDER / "model.safetensors"), shape)
    missing, unexpected = module.load_state_dict(pad_vocabulary(weights, module), strict=False)
    if unexpected or any("_extra_state" not in name for name in missing):
        raise RuntimeError(f"weights that do not fit: missing {missing}, unexpected {unexpected}")
    model._save_restore_connector = NLPSaveRestoreConnector()
    model.save_to(str(path))


def model_config(shape: dict[str, Any]) -> DictConfig:
    """NeMo's configuration of the architecture; what training needs beyond it is in conf/nemo_aligner."""
    return OmegaConf.create(
        {
            "mcore_gpt": True,
            "seed": 1234,
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "encoder_seq_length": shape["max_position_embeddings"],
            "max_position_embeddings": shape["max_position_embeddings"],
            "num_layers": shape["num_hidden_layers"],
            "hidden_size": shape["hidden_size"],
            "ffn_hidden_size": shape["intermediate_size"],
            "num_attention_heads": shape["num_attention_heads"],
            "num_query_groups": shape["num_key_value_heads"],
            "normalization": "rmsnorm",
            "layernorm_epsilon": shape["rms_norm_eps"],
            "activation": "fast-swiglu",
            "position_embedding_type": "rope",
            "rotary_base": shape["rope_theta"],
            "rotary_percentage": 1.0,
            "bias": False,
            "qkv_bias": True,
            "share_embeddings_and_output_weights": False,
            "make_vocab_size_divisible_by": 20,  # 36 entries are padded to 40 at TP1 and TP2 alike
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "ffn_dropout": 0.0,
            "precision": 32,
            "megatron_amp_O2": False,
            "use_cpu_initialization": True,
            "transformer_engine": False,
            "gradient_as_bucket_view": False,
            "persist_layer_norm": False,
            "bias_activation_fusion": False,
            "bias_dropout_add_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "apply_rope_fusion": False,
            "get_attention_mask_from_fusion": False,
            "sequence_parallel": False,
            "activations_checkpoint_granularity": None,
            "activations_checkpoint_method": None,
            "activations_checkpoint_num_layers": None,
            "activations_checkpoint_layers_per_pipeline": None,
            "tokenizer": {"library": "huggingface", "type": str(FOLDER), "use_fast": True},
            "data": {"data_prefix": None, "seq_length": shape["max_position_embeddings"], "num_workers": 0},
            # what NeMo's converters leave in their files; training replaces it
            "optim": {"name": "adamw", "lr": 1e-4, "sched": {"name": "CosineAnnealing", "warmup_steps": 500}},
        }
    )


def megatron_weights(weights: dict[str, torch.Tensor], shape: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights under Megatron-Core's names; queries, keys and values interleaved by query group."""
    groups = shape["num_key_value_heads"]

    def interleaved(layer: str, what: str) -> torch.Tensor:
        parts = [weights[f"{layer}.self_attn.{name}_proj.{what}"] for name in "qkv"]
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    made = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": weights["lm_head.weight"],
    }
    for number in range(shape["num_hidden_layers"]):
        theirs, ours = f"model.layers.{number}", f"decoder.layers.{number}"
        gate_and_up = [weights[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        made |= {
            f"{ours}.input_layernorm.weight": weights[f"{theirs}.input_layernorm.weight"],
            f"{ours}.self_attention.linear_qkv.weight": interleaved(theirs, "weight"),
            f"{ours}.self_attention.linear_qkv.bias": interleaved(theirs, "bias"),
            f"{ours}.self_attention.linear_proj.weight": weights[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.pre_mlp_layernorm.weight": weights[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.mlp.linear_fc1.weight": torch.cat(gate_and_up),
            f"{ours}.mlp.linear_fc2.weight": weights[f"{theirs}.mlp.down_proj.weight"],
        }
    return made


def pad_vocabulary(weights: dict[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    """With the rows of embedding and output layer that ``module`` has; what is missing is 0."""
    wanted = module.state_dict()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = len(wanted[name]) - len(weights[name])
        weights[name] = (
            torch.nn.functional.pad(weights[name], (0, 0, 0, rows)) if rows > 0 else weights[name][: rows or None]
        )
    return weights


if __name__ == "__main__":
    main()
