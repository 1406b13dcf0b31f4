"""Configuration of the data: prompts, reference answers, and how responses are verified."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import check_fields, number


@dataclass(kw_only=True)
class ExtraReward:
    """A further verifier whose weighted value is added to the reward."""

    name: str = MISSING
    """The verifier, named as in `data.reward`."""

    weight: float = number(MISSING, "[-1000, 1000]")
    """Factor of the verifier's value in the shaped reward."""

    def __post_init__(self) -> None:
        check_fields(self, "data.extra_rewards", error=UserError)


@dataclass(kw_only=True)
class DataConfig:
    """Prompts, reference answers, and how responses are verified."""

    train: str = MISSING
    """Training prompts: a .jsonl, .csv, .tsv or .parquet file, a folder that `datasets` saved, or a hub dataset's
    id."""

    train_split: str = "train"
    """Split of `train`, where it is a dataset."""

    eval: str | None = None
    """Held-out prompts for evaluation, a source like `train`; null evaluates nothing."""

    eval_split: str = "test"
    """Split of `eval`, where it is a dataset."""

    subset: str | None = None
    """Configuration of a hub dataset that has several."""

    prompt_key: str = "prompt"
    """Column of the prompt: a text, or a list of chat messages."""

    answer_key: str = "answer"
    """Column of the reference answer: a text or a number."""

    solution_key: str = "solution"
    """Column of a golden solution, for `algo.demonstrations`, and for `echorl-nemo analyze` where every row has one."""

    solutions: str | None = None
    """A source like `train` with the solutions for `algo.demonstrations`: its rows have the same prompt, and
    `solution_key`. Null takes them from `train`."""

    prompt_template: str | None = None
    """Jinja template of the prompt over the row's columns, in place of `prompt_key`: `Solve: {{ problem }}`. `row` is
    the whole row, for columns whose names are not words."""

    answer_template: str | None = None
    """Jinja template of the reference answer, in place of `answer_key`: `{{ answer.split('####')[-1].strip() }}`. The
    filter `last_boxed` gives the content of a text's last \\boxed{}."""

    chat_template: bool | None = None
    """Wrap a prompt in the model's chat template; lists of messages are always wrapped. Null wraps if
    `model.chat_template` names a template."""

    system_prompt: str | None = None
    """System message put before a prompt. It needs a chat template."""

    max_prompt_tokens: int = number(1024, "[1, 10000000]")
    """Most tokens that a prompt may have."""

    drop_long_prompts: bool = False
    """Leave out prompts longer than `max_prompt_tokens`. False refuses the run before it starts."""

    reward: str = "math"
    """Verifier that decides success: `math` (math-verify), `exact_line` (the final `A:` line), `choice` (the letter of
    a multiple choice), or your own function, `package.module:name`, of (response, answer)."""

    extra_rewards: list[ExtraReward] = field(default_factory=list)
    """Further verifiers with their weights, `[{name: "my.module:style", weight: 0.1}]`: added to the reward that
    advantages are estimated from, after success is decided."""

    reward_timeout: float = number(10.0, "(0, 86400]")
    """Seconds that a verifier may take for a response. After that the reward is 0 and the failure is counted."""

    reward_workers: int = number(2, "[1, 1024]")
    """Processes of each rank that verify. `exact_line` and `choice` need none."""

    def __post_init__(self) -> None:
        check_fields(self, "data", error=UserError)
