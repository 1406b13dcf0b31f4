"""Prompts with reference answers, read from a data source and encoded."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from echorl_nemo.data.config import DataConfig
from echorl_nemo.data.source import raise_bad_rows, read_rows
from echorl_nemo.data.templates import compile_template, render
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError
from echorl_nemo.rewards import find_verifier, reference_problem, takes_row


@dataclass(frozen=True)
class Prompt:
    """One prompt with its tokens, ready for generation."""

    tokens: tuple[int, ...]
    text: str
    answer: str
    group_id: int
    """Number of the rollout group. Each use of the prompt in a run has its own."""
    row: Mapping[str, Any] | None = None
    """The row of the data, if a verifier of the run takes it."""
    solution: str = ""
    """A whole response by an expert; empty if the run takes none."""
    hint: int = 0
    """Tokens of the solution at the end of `tokens`."""


class PromptData:
    """The prompts of a data source. Training reads them through `sequence`, in seeded random order."""

    def __init__(
        self,
        source: str,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        field: str,
        split: str = "train",
        longest_solution: int | None = None,
    ) -> None:
        """``field``: the configuration key of ``source``, for error messages. ``longest_solution``: the run needs a
        solution of every prompt, of at most so many tokens with its end; None needs none.

        Raises UserError if the source cannot be read, or with the first bad rows.
        """
        self._tokens: list[tuple[int, ...]] = []
        self._texts: list[str] = []
        self._answers: list[str] = []
        self._rows: list[Mapping[str, Any]] = []
        solutions: list[Any] = []
        problems: list[str] = []
        dropped = 0
        digest = hashlib.sha256()
        keep_rows = any(takes_row(find_verifier(name)) for name in verifier_names(config))
        reader = _RowReader(config, tokenizer)
        read_solution = _SolutionReader(config, tokenizer, longest_solution)
        for where, row in read_rows(source, subset=config.subset, split=split, field=field):
            try:
                if isinstance(row, UserError):
                    raise row
                text, tokens, answer = reader.read(row, where)
                solution = read_solution(row, where)
            except UserError as error:
                problems.append(str(error))
                continue
            if len(tokens) > config.max_prompt_tokens and config.drop_long_prompts:
                dropped += 1
                continue
            if len(tokens) > config.max_prompt_tokens:
                problems.append(
                    f"{where}: the prompt has {len(tokens)} tokens, data.max_prompt_tokens={config.max_prompt_tokens}; "
                    "raise the limit, drop the line, or set data.drop_long_prompts=true"
                )
                continue
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            self._tokens.append(tokens)
            self._texts.append(text)
            self._answers.append(answer)
            if keep_rows:
                self._rows.append(row)
            solutions.append(solution)
        raise_bad_rows(problems)
        self._give_solutions = longest_solution is not None
        self.longest_solution = read_solution.longest
        """Tokens of the longest solution with its end; 0 if the run takes none."""
        self.solutions: list[str] = solutions if all(isinstance(s, str) and s for s in solutions) else []
        """A golden solution for each prompt; empty if any prompt has none."""
        if not self._tokens:
            raise UserError(f"{field}={source} holds no prompt ({dropped} were longer than data.max_prompt_tokens)")
        if dropped:
            logging.getLogger(__name__).warning(
                "%s=%s: %d of %d prompts are longer than %d tokens and left out",
                field, source, dropped, dropped + len(self), config.max_prompt_tokens,
            )  # fmt: skip
        self.fingerprint = f"{len(self)} prompts {digest.hexdigest()[:16]}"
        """Number of prompts and a hash of their rows, in order. The rendered prompts are not hashed, since a chat
        template may print the date."""

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(tokens) for tokens in self._tokens)

    @property
    def largest_id(self) -> int:
        """The largest token id of the prompts."""
        return max(max(tokens) for tokens in self._tokens)

    def token_ids(self) -> Sequence[tuple[int, ...]]:
        """The tokens of every prompt, in the source's order."""
        return self._tokens

    def all(self) -> list[Prompt]:
        """Every prompt, in the source's order."""
        return [self._prompt(index, group_id=index) for index in range(len(self))]

    def sequence(self, start: int, count: int, *, seed: int) -> list[Prompt]:
        """``count`` prompts from position ``start`` of an endless sequence of shuffled epochs. A resumed run needs only
        the position to continue."""
        prompts, orders = [], {}
        for position in range(start, start + count):
            epoch, offset = divmod(position, len(self))
            if epoch not in orders:
                orders[epoch] = self._order(epoch, seed)
            prompts.append(self._prompt(orders[epoch][offset], group_id=position))
        return prompts

    def _order(self, epoch: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(len(self), generator=generator).tolist()

    def _prompt(self, index: int, group_id: int) -> Prompt:
        row = self._rows[index] if self._rows else None
        solution = self.solutions[index] if self._give_solutions else ""
        return Prompt(self._tokens[index], self._texts[index], self._answers[index], group_id, row, solution)


def verifier_names(config: DataConfig) -> list[str]:
    """Names of the verifiers: the one that decides success first, then those that shape the reward."""
    return [config.reward, *(extra.name for extra in config.extra_rewards)]


class _RowReader:
    """Reads prompt and reference answer from a row, by the keys and templates of the configuration."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._prompt = compile_template(config.prompt_template, "data.prompt_template")
        self._answer = compile_template(config.answer_template, "data.answer_template")

    def read(self, row: dict[str, Any], where: str) -> tuple[str, tuple[int, ...], str]:
        """(text, tokens) of the prompt, and the reference answer. Raises UserError that names the row."""
        text, tokens = self.prompt(row, where)
        if not tokens:
            raise UserError(f"{where}: {self.config.prompt_key}={text!r} has no token; drop the line")
        return text, tokens, self.answer(row, where)

    def prompt(self, row: dict[str, Any], where: str) -> tuple[str, tuple[int, ...]]:
        config, key = self.config, self.config.prompt_key
        prompt = row.get(key)
        if self._prompt is not None:
            prompt, key = render(self._prompt, row, where, "data.prompt_template"), "data.prompt_template"
        if isinstance(prompt, (str, list)) and not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise UserError(f"{where}: {key} is empty; drop the line")
        wrap = self.tokenizer.uses_chat_template if config.chat_template is None else config.chat_template
        if isinstance(prompt, str) and not wrap:
            if config.system_prompt is not None:
                raise UserError(
                    f"{where}: data.system_prompt has no effect on a prompt without a chat template; set "
                    "data.chat_template=true, or data.system_prompt=null"
                )
            check_text(prompt, where, key)
            return prompt, tuple(self.tokenizer.encode(prompt))
        messages = self._messages(prompt, row, where)
        if messages[-1]["role"] == "assistant":
            raise UserError(
                f"{where}: {key}: the last message is the assistant's; leave it out, the model generates that message"
            )
        try:
            text = self.tokenizer.render_chat(messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        check_text(text, where, key)
        if not text.strip():
            raise UserError(f"{where}: {key}: the chat template renders it as an empty text; see model.chat_template")
        return text, tuple(self.tokenizer.encode(text, rendered=True))

    def answer(self, row: dict[str, Any], where: str) -> str:
        key = self.config.answer_key
        answer = row.get(key)
        if self._answer is not None:
            answer, key = render(self._answer, row, where, "data.answer_template"), "data.answer_template"
        if not isinstance(answer, (str, int, float)) or (isinstance(answer, float) and not math.isfinite(answer)):
            raise UserError(f"{where}: {key}={answer!r} is not a text or a number; see data.answer_key")
        text = str(answer)
        if not text.strip():
            raise UserError(f"{where}: {key}={text!r} is empty: no response could match it; drop the line")
        check_text(text, where, key)
        for name in verifier_names(self.config):
            if problem := reference_problem(name, text):
                raise UserError(f"{where}: {key}: {problem}; correct or drop the line")
        return text

    def _messages(self, prompt: Any, row: dict[str, Any], where: str) -> list[dict[str, Any]]:
        """The chat messages of a prompt, each with its content as one text."""
        config = self.config
        if isinstance(prompt, str):
            messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
            messages = [{**message, "content": _content(message, where, config.prompt_key)} for message in prompt]
        else:
            raise UserError(
                f"{where}: {config.prompt_key}={prompt!r} is neither a text nor a list of chat messages; the row has "
                f"{', '.join(map(str, row))}: see data.prompt_key"
            )
        if config.system_prompt is not None:
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        return messages


class _SolutionReader:
    """Reads the solution of a row, from the row or from the file `data.solutions`."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, longest: int | None) -> None:
        self.config, self.tokenizer, self.limit, self.longest = config, tokenizer, longest, 0
        self._by_prompt: dict[str, Any] | None = None
        if longest is not None and config.solutions is not None:
            rows = list(read_rows(config.solutions, subset=None, split="train", field="data.solutions"))
            raise_bad_rows([str(row) for _, row in rows if isinstance(row, UserError)])
            self._by_prompt = {
                _prompt_key(row, config): row.get(config.solution_key)
                for _, row in rows
                if not isinstance(row, UserError)
            }

    def __call__(self, row: dict[str, Any], where: str) -> Any:
        """The solution, of any type if the run takes none. Raises UserError that names the row."""
        key = self.config.solution_key
        if self._by_prompt is None:
            solution = row.get(key)
        else:
            solution = self._by_prompt.get(_prompt_key(row, self.config))
        if self.limit is None:
            return solution
        if not isinstance(solution, str) or not solution.strip():
            what = f"{key}={solution!r}" if self._by_prompt is None else f"data.solutions has no {key} of this prompt"
            raise UserError(
                f"{where}: {what}: algo.demonstrations needs a solution of every prompt; add it or drop the line"
            )
        check_text(solution, where, key)
        tokens = len(self.tokenizer.encode_solution(solution))
        if tokens > self.limit:
            raise UserError(
                f"{where}: {key} has {tokens} tokens with its end, rollout.max_new_tokens={self.limit}; raise the "
                "limit or drop the line"
            )
        self.longest = max(self.longest, tokens)
        return solution


def _prompt_key(row: Mapping[str, Any], config: DataConfig) -> str:
    return json.dumps(row.get(config.prompt_key), sort_keys=True, default=str)


def _content(message: Mapping[str, Any], where: str, key: str) -> str:
    """The text of a message; for a list of parts, their texts joined. Raises UserError for any other content."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: {key}: the content of a {message['role']} message is {content!r}; use a text, or a list of "
            'parts {"type": "text", "text": ...}'
        )
    return "".join(str(text) for text in texts)


def check_text(text: str, where: str, key: str) -> None:
    """Raises UserError if ``text`` holds half of a surrogate pair, which no tokenizer and no UTF-8 file accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {key} holds {text[error.start]!r}, half of a surrogate pair; correct or drop the line"
        ) from error
