"""What a run reads before it starts: the tokenizer and the prompts."""

from dataclasses import dataclass

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunInputs:
    """The tokenizer and the prompts of a run."""

    tokenizer: Tokenizer
    train_data: PromptData
    eval_data: PromptData | None
    boundary_ids: tuple[int, ...]
    """Ids of the tokens that end a step."""
