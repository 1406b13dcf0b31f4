"""Writes the prompts for NeMo-Aligner and NeMo-RL: chat template applied, one JSON object a line."""

import json
from pathlib import Path

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError


def write_prompts(path: Path, data: PromptData, tokenizer: Tokenizer) -> None:
    """Write {"prompt": ..., "answer": ...} of each prompt to ``path``. The file appears only when it is complete.

    The prompt is the text of its tokens, special ones included. A host that encodes it without adding special tokens
    gets the tokens that the native engine generates from. Raises UserError for a prompt for which that is not true.
    """
    for number, prompt in enumerate(data.all(), 1):
        if tuple(tokenizer.encode(tokenizer.decode_with_special_tokens(prompt.tokens), rendered=True)) != prompt.tokens:
            raise UserError(
                f"prompt {number} ({prompt.text[:60]!r}) changes when it is decoded and encoded again, so that a host "
                "would use another prompt; correct or drop it, or use engine=megatron"
            )
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for prompt in data.all():
            row = {"prompt": tokenizer.decode_with_special_tokens(prompt.tokens), "answer": prompt.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.rename(path)
