"""Prompts with reference answers, from JSONL files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError


@dataclass(kw_only=True)
class DataConfig:
    """What is asked, and how answers are verified."""

    train: str = MISSING
    """JSONL file, one prompt a line."""

    eval: str | None = None
    """JSONL file of held-out prompts; null: no evaluation."""

    prompt_key: str = "prompt"
    """Column of the prompt: a text, or a list of chat messages."""

    answer_key: str = "answer"
    """Column of the reference answer: a text or a number."""

    chat_template: bool = False
    """Wrap a prompt in the tokenizer's chat template; lists of messages are always wrapped."""

    system_prompt: str | None = None
    """System message put before a prompt, with a chat template."""

    max_prompt_tokens: int = 1024
    """A longer prompt stops the run before it starts."""

    reward: str = "math"
    """Verifier: `math` (math-verify) or `exact_line` (the final `A:` line)."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be generated from."""

    tokens: tuple[int, ...]
    text: str
    answer: str
    group_id: int
    """Unique in the run for each time that the prompt is asked."""


class PromptData:
    """The prompts of a file, in the order of a seeded shuffle that depends on their position alone."""

    def __init__(self, path: str, config: DataConfig, tokenizer: Tokenizer, *, field: str) -> None:
        """``field`` names the config key of ``path`` in errors. Raises UserError for a bad file, line or prompt."""
        self._tokens: list[tuple[int, ...]] = []
        self._texts: list[str] = []
        self._answers: list[str] = []
        for where, row in read_jsonl(path, field=field):
            text, tokens = _encode(row, where, config, tokenizer)
            answer = row.get(config.answer_key)
            if not isinstance(answer, (str, int, float)):
                raise UserError(f"{where}: {config.answer_key}={answer!r} is no text or number; see data.answer_key")
            if not tokens:
                raise UserError(f"{where}: {config.prompt_key} is empty; drop the line")
            if len(tokens) > config.max_prompt_tokens:
                raise UserError(
                    f"{where}: the prompt has {len(tokens)} tokens, data.max_prompt_tokens={config.max_prompt_tokens}; "
                    "raise the limit or drop the line"
                )
            self._tokens.append(tokens)
            self._texts.append(text)
            self._answers.append(str(answer))
        if not self._tokens:
            raise UserError(f"{field}={path} holds no prompt")

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(tokens) for tokens in self._tokens)

    def all(self) -> list[Prompt]:
        """Every prompt, in the file's order."""
        return [self._prompt(index, group_id=index) for index in range(len(self))]

    def sequence(self, start: int, count: int, *, seed: int) -> list[Prompt]:
        """``count`` prompts from position ``start`` of an endless sequence of shuffled epochs, so that a resumed run
        needs no state but its position."""
        prompts, orders = [], {}
        for position in range(start, start + count):
            epoch, offset = divmod(position, len(self))
            if epoch not in orders:
                orders[epoch] = self._order(epoch, seed)
            prompts.append(self._prompt(orders[epoch][offset], group_id=position))
        return prompts

    def _order(self, epoch: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self), generator=generator).tolist()

    def _prompt(self, index: int, group_id: int) -> Prompt:
        return Prompt(self._tokens[index], self._texts[index], self._answers[index], group_id)


def read_jsonl(path: str, *, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not blank. Raises UserError for a missing file or a bad line."""
    if not Path(path).is_file():
        raise UserError(f"{field}={path}: no such file")
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not JSON in UTF-8 ({error}); each line must be one JSON object") from error
            if not isinstance(row, dict):
                raise UserError(f'{where}: a JSON {type(row).__name__}, not an object like {{"prompt": ...}}')
            yield where, row


def _encode(row: dict[str, Any], where: str, config: DataConfig, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    prompt = row.get(config.prompt_key)
    if isinstance(prompt, str) and not config.chat_template:
        return prompt, tuple(tokenizer.encode(prompt))
    if isinstance(prompt, str):
        messages: Sequence[dict[str, str]] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        messages = prompt
    else:
        raise UserError(
            f"{where}: {config.prompt_key}={prompt!r} is no text and no list of chat messages; the line has "
            f"{', '.join(row)}: see data.prompt_key"
        )
    if config.system_prompt is not None:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    try:
        text = tokenizer.render_chat(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return text, tuple(tokenizer.encode(text, rendered=True))
