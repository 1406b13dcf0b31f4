"""Prompts with reference answers, from a data source."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING

from echorl_nemo.data.source import read_rows
from echorl_nemo.data.templates import compile_template, render
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError


@dataclass(kw_only=True)
class ExtraReward:
    """A verifier that shapes the reward."""

    name: str = MISSING
    """As in `data.reward`."""

    weight: float = MISSING
    """Of its value in the shaped reward."""


@dataclass(kw_only=True)
class DataConfig:
    """What is asked, and how answers are verified."""

    train: str = MISSING
    """A .jsonl or .parquet file, a folder that `datasets` saved, or the id of a hub dataset."""

    train_split: str = "train"
    """Split of `train`, where it is a dataset."""

    eval: str | None = None
    """Held-out prompts, a source like `train`; null: no evaluation."""

    eval_split: str = "test"
    """Split of `eval`, where it is a dataset."""

    subset: str | None = None
    """Configuration of a hub dataset that has several."""

    prompt_key: str = "prompt"
    """Column of the prompt: a text, or a list of chat messages."""

    answer_key: str = "answer"
    """Column of the reference answer: a text or a number."""

    solution_key: str = "solution"
    """Column of a golden solution, for `echorl-nemo analyze`; used where every row has one."""

    prompt_template: str | None = None
    """Jinja template of the prompt over the row's columns, in place of `prompt_key`: `Solve: {{ problem }}`. `row` is
    the whole row, for columns whose names are no words."""

    answer_template: str | None = None
    """Jinja template of the reference answer, in place of `answer_key`: `{{ answer.split('####')[-1].strip() }}`. The
    filter `last_boxed` gives what stands in a text's last \\boxed{}."""

    chat_template: bool | None = None
    """Wrap a prompt in the model's chat template; lists of messages are always wrapped. Null: where
    `model.chat_template` names one."""

    system_prompt: str | None = None
    """System message put before a prompt, with a chat template."""

    max_prompt_tokens: int = 1024
    """Longest prompt."""

    drop_long_prompts: bool = False
    """Leave out prompts that are longer. False stops the run before it starts."""

    reward: str = "math"
    """Verifier that decides success: `math` (math-verify), `exact_line` (the final `A:` line), `choice` (the letter of
    a multiple choice), or a function of one's own, `package.module:name`, of (response, answer)."""

    extra_rewards: list[ExtraReward] = field(default_factory=list)
    """Further verifiers with their weights, `[{name: "my.module:style", weight: 0.1}]`: added to the reward that
    advantages are estimated from, after success is decided."""

    reward_timeout: float = 10.0
    """Seconds that a verifier may take for a response; then the reward is 0, and counted."""

    reward_workers: int = 2
    """Processes of each rank that verify; `exact_line` needs none."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "reward_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least 1")
        if self.reward_timeout <= 0:
            raise UserError(f"data.reward_timeout={self.reward_timeout} must be above 0 seconds")


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to be generated from."""

    tokens: tuple[int, ...]
    text: str
    answer: str
    group_id: int
    """Unique in the run for each time that the prompt is asked."""


class PromptData:
    """The prompts of a source, in the order of a seeded shuffle that depends on their position alone."""

    def __init__(
        self, source: str, config: DataConfig, tokenizer: Tokenizer, *, field: str, split: str = "train"
    ) -> None:
        """``field`` names the config key of ``source`` in errors. Raises UserError for a bad file, row or prompt."""
        self._tokens: list[tuple[int, ...]] = []
        self._texts: list[str] = []
        self._answers: list[str] = []
        solutions: list[Any] = []
        dropped = 0
        reader = _RowReader(config, tokenizer)
        for where, row in read_rows(source, subset=config.subset, split=split, field=field):
            text, tokens = reader.prompt(row, where)
            answer = reader.answer(row, where)
            if len(tokens) > config.max_prompt_tokens:
                if not config.drop_long_prompts:
                    raise UserError(
                        f"{where}: the prompt has {len(tokens)} tokens, data.max_prompt_tokens="
                        f"{config.max_prompt_tokens}; raise the limit, drop the line, or set "
                        "data.drop_long_prompts=true"
                    )
                dropped += 1
                continue
            self._tokens.append(tokens)
            self._texts.append(text)
            self._answers.append(answer)
            solutions.append(row.get(config.solution_key))
        self.solutions: list[str] = solutions if all(isinstance(s, str) and s for s in solutions) else []
        """A golden solution of each prompt, or none at all."""
        if not self._tokens:
            raise UserError(f"{field}={source} holds no prompt ({dropped} were longer than data.max_prompt_tokens)")
        if dropped:
            logging.getLogger(__name__).warning(
                "%s=%s: %d of %d prompts are longer than %d tokens and left out",
                field, source, dropped, dropped + len(self), config.max_prompt_tokens,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(tokens) for tokens in self._tokens)

    @property
    def fingerprint(self) -> str:
        """Number of prompts, and a hash of them and their answers in their order."""
        digest = hashlib.sha256()
        for tokens, answer in zip(self._tokens, self._answers, strict=True):
            digest.update(f"{tokens} {answer!r}\n".encode())
        return f"{len(self)} prompts {digest.hexdigest()[:16]}"

    def all(self) -> list[Prompt]:
        """Every prompt, in the source's order."""
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


class _RowReader:
    """Prompt and answer of a row, as the configuration says."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._prompt = compile_template(config.prompt_template, "data.prompt_template")
        self._answer = compile_template(config.answer_template, "data.answer_template")

    def prompt(self, row: dict[str, Any], where: str) -> tuple[str, tuple[int, ...]]:
        config = self.config
        prompt = row.get(config.prompt_key)
        if self._prompt is not None:
            prompt = render(self._prompt, row, where, "data.prompt_template")
        wrap = self.tokenizer.wraps_prompts if config.chat_template is None else config.chat_template
        if isinstance(prompt, str) and not wrap:
            text, tokens = prompt, tuple(self.tokenizer.encode(prompt))
        else:
            text, tokens = self._chat(prompt, row, where)
        if not prompt:
            raise UserError(f"{where}: {config.prompt_key} is empty; drop the line")
        return text, tokens

    def answer(self, row: dict[str, Any], where: str) -> str:
        if self._answer is not None:
            return render(self._answer, row, where, "data.answer_template")
        answer = row.get(self.config.answer_key)
        if not isinstance(answer, (str, int, float)):
            raise UserError(f"{where}: {self.config.answer_key}={answer!r} is no text or number; see data.answer_key")
        return str(answer)

    def _chat(self, prompt: Any, row: dict[str, Any], where: str) -> tuple[str, tuple[int, ...]]:
        config = self.config
        if isinstance(prompt, str):
            messages: Sequence[dict[str, str]] = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
            messages = prompt
        else:
            raise UserError(
                f"{where}: {config.prompt_key}={prompt!r} is no text and no list of chat messages; the row has "
                f"{', '.join(row)}: see data.prompt_key"
            )
        if config.system_prompt is not None:
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        try:
            text = self.tokenizer.render_chat(messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return text, tuple(self.tokenizer.encode(text, rendered=True))
