"""Prompts as a host reads them: rendered, one JSON object a line."""

import json
from pathlib import Path

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError


def write_prompts(path: Path, data: PromptData, tokenizer: Tokenizer) -> None:
    """Write {"prompt": ..., "answer": ...} of each prompt to ``path``, which appears once it is whole.

    The prompt is the text of its tokens, special ones included: encoded without further special tokens, it gives the
    tokens that the native engine would generate from. Raises UserError for a prompt of which that is not true.
    """
    for number, prompt in enumerate(data.all(), 1):
        if tuple(tokenizer.encode(tokenizer.text(prompt.tokens), rendered=True)) != prompt.tokens:
            raise UserError(
                f"prompt {number} ({prompt.text[:60]!r}) does not survive decoding and encoding, so that a host would "
                "ask another one; correct or drop it, or use engine=megatron"
            )
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for prompt in data.all():
            row = {"prompt": tokenizer.text(prompt.tokens), "answer": prompt.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.rename(path)
