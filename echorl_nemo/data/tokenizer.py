"""The tokenizer of the policy: encoding, decoding, stop tokens, chat template, and its comparison with its files."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from echorl_nemo.errors import UserError, first_line
from echorl_nemo.releases import load_tokenizer

PROBES = (
    "The quick brown fox jumps over the lazy dog.", "9a+4b+2\n", "A:3\n", " two  spaces\tand a tab", "x = [1, 2]; y",
    "\\boxed{\\frac{1}{2}}\n\n", "0123456789", "ÄÖü ß é ñ", "日本語のテキスト", "🙂", "don't I'll", "UPPER lower MiXed",
)  # fmt: skip
"""Texts that the loaded tokenizer must split exactly as tokenizer.json does."""


class Tokenizer:
    """A Hugging Face tokenizer with the stop tokens of its model."""

    def __init__(
        self,
        path: str,
        *,
        trust_remote_code: bool = False,
        chat_template: str = "none",
        stop_tokens: Sequence[str] = (),
        keep_special_tokens: bool = False,
        verify: bool = True,
    ) -> None:
        """``chat_template``, ``stop_tokens`` and ``keep_special_tokens`` are the keys of `model`. ``verify``: whether
        to compare the loaded tokenizer with tokenizer.json.

        Raises UserError if ``path`` holds no tokenizer, or one that differs from its tokenizer.json, has no
        end-of-sequence token, or lacks one of ``stop_tokens``.
        """
        self.hf: PreTrainedTokenizerBase = _load(path, trust_remote_code)
        if self.hf.eos_token_id is None:
            raise UserError(
                f"model.path={path}: the tokenizer has no eos_token, so that rollouts could not end; name one in "
                "tokenizer_config.json"
            )
        if verify:
            _compare_with_file(path, self.hf)
        self._path, self._keep_special_tokens = path, keep_special_tokens
        self.stop_ids = tuple(sorted({*_stop_ids(path, self.hf), *_token_ids(path, self.hf, stop_tokens)}))
        self.uses_chat_template = chat_template != "none"
        """Whether prompts are wrapped in the chat template by default; `data.chat_template` overrides it."""
        if chat_template not in ("none", "tokenizer"):
            self.hf.chat_template = chat_template
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.hf.eos_token_id
        self._lead = _leading_ids(path, self.hf)
        self._stops_at_turn_ends = False
        if self.uses_chat_template:
            self._stop_at_turn_ends()

    def __len__(self) -> int:
        """Size of the vocabulary, which is the largest id plus 1."""
        return max(self.hf.get_vocab().values()) + 1

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Text of each sequence of ids. `echo.boundary_ids` reads the text of the vocabulary through it."""
        return self.hf.batch_decode(sequences, **kwargs)

    def encode(self, text: str, *, rendered: bool = False) -> list[int]:
        """Token ids of a prompt.

        A plain text gets the special tokens that the tokenizer puts first (such as a beginning of sequence) unless it
        begins with them already. Closing special tokens are never added: they would end the prompt. A text that the
        chat template ``rendered`` holds its special tokens itself.
        """
        ids = list(self.hf.encode(text, add_special_tokens=False))
        return ids if rendered or ids[: len(self._lead)] == self._lead else [*self._lead, *ids]

    def encode_solution(self, text: str) -> list[int]:
        """Token ids of a whole response: its text, and the end of sequence."""
        return [*self.encode(text, rendered=True), int(self.hf.eos_token_id)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response without its special tokens. With `model.keep_special_tokens` only a stop token at the end
        is left out."""
        if self._keep_special_tokens:
            end = len(ids) - (len(ids) > 0 and ids[-1] in self.stop_ids)
            return self.decode_with_special_tokens(list(ids)[:end])
        return self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_with_special_tokens(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token separately, special tokens included, for people to read."""
        return self.hf.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The messages in the model's chat template, ending where the assistant's message begins."""
        self._stop_at_turn_ends()
        return self._render(messages, open_turn=True)

    def _render(self, messages: Sequence[dict[str, Any]], *, open_turn: bool) -> str:
        if self.hf.chat_template is None:
            raise UserError(
                "model.chat_template=tokenizer, data.chat_template=true or a prompt of messages: the tokenizer has no "
                "chat template; give model.chat_template the text of one, or use none"
            )
        try:
            return str(self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise UserError(f"model.chat_template: {error}") from error

    def _stop_at_turn_ends(self) -> None:
        """Add the special token that closes an assistant's turn in the chat template to the stop tokens, with a
        warning: a policy that has learnt the template ends its responses with that token."""
        if self._stops_at_turn_ends:
            return
        self._stops_at_turn_ends = True
        asked, answer = "two+two", "four"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        if asked not in self._render(turns[:1], open_turn=True):
            raise UserError(
                "model.chat_template: it leaves the user's message out, so that every prompt would be the same; use "
                "the text of another template"
            )
        _, found, closed = self._render(turns, open_turn=False).rpartition(answer)
        following = self.encode(closed, rendered=True)[:1]
        if not found or not following or following[0] in (*self.stop_ids, self.hf.unk_token_id):
            return
        warn = logging.getLogger(__name__).warning
        (token,) = self.pieces(following)
        if following[0] in self.hf.all_special_ids or following[0] in getattr(self.hf, "added_tokens_decoder", {}):
            self.stop_ids = tuple(sorted({*self.stop_ids, following[0]}))
            warn("model.path=%s: the chat template closes a turn with %r, now a stop token too", self._path, token)
        else:
            warn(
                "model.path=%s: the chat template closes a turn with %r, which is not a special token; responses may "
                "not end there: name what ends them in model.stop_tokens", self._path, token,
            )  # fmt: skip


def _load(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return tokenizer
    except Exception as error:  # transformers raises anything for a damaged file
        cause = first_line(error)
        raise UserError(
            f"model.path={path}: no tokenizer can be read: {type(error).__name__}: {cause}; name a folder that holds a "
            "whole one"
        ) from error


def _compare_with_file(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the tokenizer and tokenizer.json split a probe differently. transformers chooses the
    tokenizer's class by names in other files; a wrong class trains on wrong tokens without an error."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return
    reference = tokenizers.Tokenizer.from_file(str(file))
    reference.no_padding()
    reference.no_truncation()
    for name in ("eos_token", "bos_token"):
        token = getattr(tokenizer, name)
        if token is not None and (not token or token not in reference.get_vocab(with_added_tokens=True)):
            raise UserError(
                f"model.path={path}: its {name} {token!r} is not in tokenizer.json, so that the model has not learnt "
                f"it; correct {name} in tokenizer_config.json and special_tokens_map.json"
            )
    for probe in PROBES:
        loaded = list(tokenizer.encode(probe, add_special_tokens=False))
        expected = list(reference.encode(probe, add_special_tokens=False).ids)
        if loaded != expected:
            raise UserError(
                f"model.path={path}: {type(tokenizer).__name__} encodes {probe!r} as {loaded[:12]}, tokenizer.json as "
                f"{expected[:12]}; correct tokenizer_class in tokenizer_config.json, or set model.verify=off if the "
                "class is right"
            )


def _leading_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens that the tokenizer puts before a text. Warns about those that it appends."""
    probe = "1"
    plain = list(tokenizer.encode(probe, add_special_tokens=False))
    whole = list(tokenizer.encode(probe, add_special_tokens=True))
    starts = [start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain]
    if not starts:  # it changes the text itself
        return []
    if appended := whole[starts[-1] + len(plain) :]:
        logging.getLogger(__name__).warning(
            "model.path=%s: the tokenizer appends %s to a text; it is left out of prompts, which would end there",
            path, tokenizer.decode(appended),
        )  # fmt: skip
    return whole[: starts[-1]]


def _token_ids(path: str, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    if strange := [token for token in tokens if token not in vocabulary]:
        raise UserError(
            f"model.stop_tokens={list(tokens)}: the tokenizer of model.path={path} has no token {', '.join(strange)}; "
            "name tokens of its vocabulary, or choose the model= that goes with the path"
        )
    return [vocabulary[token] for token in tokens]


def _stop_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokenizer's end of sequence and of those in generation_config.json: a chat model often ends its turn
    with another token than its base model."""
    ids = {int(tokenizer.eos_token_id)}
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except (ValueError, TypeError) as error:
        raise UserError(f"model.path={path}: generation_config.json cannot be read: {error}; correct it") from error
    except OSError as error:  # the file is optional
        if (Path(path) / "generation_config.json").is_file():
            raise UserError(f"model.path={path}: generation_config.json cannot be read; correct it") from error
        configured = None
    stops = [] if configured is None else configured if isinstance(configured, list) else [configured]
    if strange := [stop for stop in stops if type(stop) is not int or stop < 0]:
        raise UserError(
            f"model.path={path}: generation_config.json has eos_token_id={configured!r}: {strange[0]!r} is not a token "
            "id; correct it"
        )
    ids.update(stops)
    return tuple(sorted(ids))
