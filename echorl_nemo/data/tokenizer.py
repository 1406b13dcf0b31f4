"""The tokenizer, as the rest of the package needs it."""

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from echorl_nemo.errors import UserError


class Tokenizer:
    """A Hugging Face tokenizer with the stop tokens of its model."""

    def __init__(
        self,
        path: str,
        *,
        trust_remote_code: bool = False,
        chat_template: str = "none",
        stop_tokens: Sequence[str] = (),
    ) -> None:
        """``chat_template`` and ``stop_tokens`` as in `model`.

        Raises UserError if ``path`` holds no tokenizer, or one without an end-of-sequence token or a stop token.
        """
        try:
            self.hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"model.path={path}: no tokenizer can be read: {str(error).splitlines()[0]}") from error
        if self.hf.eos_token_id is None:
            raise UserError(f"model.path={path}: the tokenizer has no eos_token; rollouts could not end")
        self.stop_ids = tuple(sorted({*_stop_ids(path, self.hf), *_token_ids(path, self.hf, stop_tokens)}))
        self.wraps_prompts = chat_template != "none"
        """Whether prompts are wrapped in the chat template unless a data set says otherwise."""
        if chat_template not in ("none", "tokenizer"):
            self.hf.chat_template = chat_template
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.hf.eos_token_id

    def __len__(self) -> int:
        return len(self.hf)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Text of each sequence of ids; as the vocabulary's text for `echo.boundary_ids`."""
        return self.hf.batch_decode(sequences, **kwargs)

    def encode(self, text: str, *, rendered: bool = False) -> list[int]:
        """Ids of a prompt. A plain one gets the tokenizer's own special tokens, a beginning of sequence where the model
        has one; a ``rendered`` chat template has them in its text."""
        return self.hf.encode(text, add_special_tokens=not rendered)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        return self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, special tokens included, for people to read."""
        return self.hf.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages in the model's chat template, open for the assistant's turn."""
        if self.hf.chat_template is None:
            raise UserError(
                "model.chat_template=tokenizer, data.chat_template=true or a prompt of messages: the tokenizer has no "
                "chat template; give model.chat_template the text of one, or use none"
            )
        try:
            return str(self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise UserError(f"model.chat_template: {error}") from error


def _token_ids(path: str, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    if strange := [token for token in tokens if token not in vocabulary]:
        raise UserError(
            f"model.stop_tokens={list(tokens)}: the tokenizer of model.path={path} has no token {', '.join(strange)}; "
            "name tokens of its vocabulary, or choose the model= that goes with the path"
        )
    return [vocabulary[token] for token in tokens]


def _stop_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's end of sequence and those of generation_config.json (a chat model often ends its turn with
    another token than its base model)."""
    ids = {int(tokenizer.eos_token_id)}
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the file is optional
        configured = None
    if configured is not None:
        ids.update([configured] if isinstance(configured, int) else configured)
    return tuple(sorted(ids))
