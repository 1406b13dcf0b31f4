"""Prompts as a host reads them: rendered, one JSON object a line."""

import json
from pathlib import Path

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer


def write_prompts(path: Path, data: PromptData, tokenizer: Tokenizer) -> None:
    """Write {"prompt": ..., "answer": ...} of each prompt to ``path``, which appears once it is whole.

    The prompt is the text of its tokens, special ones included: encoded without further special tokens, it gives the
    tokens that the native engine would generate from.
    """
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for prompt in data.all():
            row = {"prompt": tokenizer.text(prompt.tokens), "answer": prompt.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.rename(path)
