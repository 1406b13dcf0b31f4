"""Checks of the data: verifiers, prompts, and lengths."""

from transformers import PretrainedConfig

from echorl_nemo.checks.hf_config import positions, vocab_size
from echorl_nemo.checks.model import prompt_token_problems, read_tokenizer, vocabulary_problems
from echorl_nemo.data.inputs import RunInputs
from echorl_nemo.data.prompts import PromptData, verifier_names
from echorl_nemo.echo import boundary_ids
from echorl_nemo.errors import UserError
from echorl_nemo.rewards import find_verifier
from echorl_nemo.schema import RunConfig


def read_inputs(config: RunConfig) -> tuple[list[str], RunInputs | None]:
    """Read tokenizer and prompts. Returns their problems, and the inputs; None if one of them cannot be read."""
    try:
        tokenizer = read_tokenizer(config.model)
    except UserError as error:
        return [str(error), *verifier_problems(config)], None
    problems, data = verifier_problems(config), config.data
    if problems:
        return problems, None
    limit, rows = positions(config.model), vocab_size(config.model)
    problems += vocabulary_problems(config.model, tokenizer, rows)
    train_data = eval_data = None
    boundaries: tuple[int, ...] = ()
    for name, source, split in (("train", data.train, data.train_split), ("eval", data.eval, data.eval_split)):
        if source is None:
            continue
        try:
            needs = name == "train" and config.algo.demonstrations != "none"
            prompts = PromptData(
                source,
                data,
                tokenizer,
                field=f"data.{name}",
                split=split,
                longest_solution=config.rollout.max_new_tokens if needs else None,
            )
        except UserError as error:
            problems += str(error).splitlines()
            continue
        # a hint may be the whole solution, and the response comes after it
        hint = prompts.longest_solution if config.algo.demonstrations == "uft" else 0
        problems += length_problems(config.rollout.max_new_tokens + hint, limit, prompts, f"data.{name}")
        problems += prompt_token_problems(prompts, rows, f"data.{name}")
        if name == "train":
            train_data = prompts
            problems += packing_problems(config, prompts.longest + hint)
        else:
            eval_data = prompts
    try:
        boundaries = boundary_ids(tokenizer, config.echorl.boundary)
    except ValueError as error:
        problems.append(str(error))
    if train_data is None:
        return problems, None
    return problems, RunInputs(tokenizer, train_data, eval_data, boundaries)


def verifier_problems(config: RunConfig) -> list[str]:
    """Problems with verifiers that do not exist."""
    problems = []
    for name in verifier_names(config.data):
        try:
            find_verifier(name)
        except UserError as error:
            problems.append(f"data.reward or data.extra_rewards: {error}")
    return problems


def length_problems(budget: int, limit: int | None, data: PromptData, name: str) -> list[str]:
    """A problem if the longest prompt and a response of ``budget`` tokens do not fit the model's ``limit`` of
    positions; None is no limit."""
    longest = data.longest + budget
    if limit is not None and longest > limit:
        return [
            f"rollout.max_new_tokens={budget}: with the longest prompt of {name}, "
            f"{data.longest} tokens, that is {longest}, the model has {limit} positions; lower it"
        ]
    return []


def position_problems(config: RunConfig, hf_config: PretrainedConfig) -> list[str]:
    """A problem if the longest allowed prompt and a response do not fit the model, for a plan that does not read the
    prompts."""
    prompt, budget = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    limit = getattr(hf_config, "max_position_embeddings", None)
    if limit is None or prompt + budget <= limit:
        return []
    return [
        f"data.max_prompt_tokens={prompt} and rollout.max_new_tokens={budget} are {prompt + budget} tokens, the model "
        f"has {limit} positions; lower one"
    ]


def packing_problems(config: RunConfig, longest_prompt: int) -> list[str]:
    """A problem if the longest rollout does not fit into a packed row. ``longest_prompt``: tokens, hints included."""
    row, longest = config.trainer.pack_tokens, longest_prompt + config.rollout.max_new_tokens
    if 0 < row < longest:
        return [
            f"trainer.pack_tokens={row}: a rollout may have {longest} tokens, the longest prompt's {longest_prompt} "
            f"and rollout.max_new_tokens={config.rollout.max_new_tokens}; use {longest} or more, or 0 to pad"
        ]
    return []
