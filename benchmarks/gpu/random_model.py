"""A Qwen3 of random weights with a tokenizer and prompts, so that speed and memory can be measured without a download.

Its responses are random words that never stop, so that each has the whole length that is asked for.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

WORDS_OF_A_PROMPT = 12


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


HALF_BILLION = Shape(151936, 1024, 3072, 24, 16, 8, 128)
"""0.53 billion parameters: Qwen3-0.6B with 24 of its 28 layers."""
SMALL = Shape(512, 64, 128, 2, 4, 2, 16)
"""To see on a CPU that it runs."""


def make_model(folder: Path, shape: Shape, *, positions: int) -> None:
    """Write config, weights in bf16 and tokenizer for sequences of at most ``positions`` tokens."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=positions, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    names = {"<eos>": 0, "\n": 1, **{f"w{number}": number for number in range(2, shape.vocabulary)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="w2"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", behavior="removed")
    words.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)


def make_prompts(path: Path, shape: Shape, count: int) -> None:
    """Write ``count`` prompts of random words with an answer that no response has, as JSONL."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2, shape.vocabulary, (count, WORDS_OF_A_PROMPT), generator=generator).tolist()
    rows = [{"prompt": " ".join(f"w{word}" for word in row), "answer": "none"} for row in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
