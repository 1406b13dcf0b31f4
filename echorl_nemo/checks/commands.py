"""The checks of each command, all problems at once: training (for `train` and `plan`), evaluation, export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PretrainedConfig

from echorl_nemo.checks import nemo_aligner, nemo_rl
from echorl_nemo.checks.data_and_lengths import length_problems, position_problems, read_inputs
from echorl_nemo.checks.files_and_folders import (
    checkpoint_problems,
    file_problems,
    nemo_path_problems,
    out_problems,
    run_dir_problems,
)
from echorl_nemo.checks.functions import function_problems
from echorl_nemo.checks.hf_config import known_config, positions, vocab_size
from echorl_nemo.checks.layout_and_batch import batch_size_problems, layout_problems
from echorl_nemo.checks.model import path_problems, prompt_token_problems, read_tokenizer, vocabulary_problems
from echorl_nemo.checks.model_build import platform_problems
from echorl_nemo.checks.packages import package_problems
from echorl_nemo.checks.rewards import reward_problems
from echorl_nemo.checks.rollout_engine import native_problems, uneven_stage_problems
from echorl_nemo.data.inputs import RunInputs
from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.errors import UserError, raise_problems
from echorl_nemo.rewards import find_verifier
from echorl_nemo.schema import EvaluateConfig, RunConfig

ENGINE_CHECKS: dict[str, Callable[[RunConfig, str], list[str]]] = {
    "megatron": lambda config, _: native_problems(config),
    "nemo_aligner": nemo_aligner.run_problems,
    "nemo_rl": lambda config, _: nemo_rl.run_problems(config),
}
"""Problems with a run on each engine, from its configuration and the model's architecture."""


LARGEST_HOST_SEED = 4_000_000_000
"""NumPy's seeds are below 2^32, and Megatron adds a hundred for each pipeline stage."""


@dataclass
class Findings:
    """The result of checking a run."""

    problems: list[str] = field(default_factory=list)
    """Reasons why the run cannot start, one a line."""
    inputs: RunInputs | None = None
    """Tokenizer and prompts; None if they were not looked for, or cannot be read."""
    hf_config: PretrainedConfig | None = None
    """The model's configuration; None if it cannot be read."""


def check_run(
    config: RunConfig, *, files: bool = True, packages: bool = True, platform: Platform | None = None
) -> Findings:
    """Find every problem of a training run that can be known before a rank starts.

    ``files``: whether the run's files are on this machine, so that they are read. ``packages``: whether the ranks run
    in this environment. ``platform``: the hardware of the ranks, if the model is to be built on it. All sizes in
    `config.parallel` must be resolved.
    """
    found = Findings()
    try:
        found.hf_config = known_config(config.model)
    except UserError as error:
        if config.model.architecture or not files:  # otherwise `path_problems` reports it
            found.problems.append(str(error))
    architecture = found.hf_config.model_type if found.hf_config is not None else "unknown model"
    found.problems += [*batch_size_problems(config), *reward_problems(config)]
    if config.engine != "megatron" and config.trainer.seed > LARGEST_HOST_SEED:
        found.problems.append(
            f"trainer.seed={config.trainer.seed}: engine={config.engine} gives it to NumPy, which takes 32 bits; use "
            f"at most {LARGEST_HOST_SEED}"
        )
    found.problems += ENGINE_CHECKS[config.engine](config, architecture)
    if found.hf_config is not None:
        found.problems += layout_problems(config.parallel, found.hf_config)
    if files:
        problems, found.inputs = read_inputs(config)
        found.problems += [*path_problems(config.model), *problems]
        if config.engine == "megatron":
            found.problems += run_dir_problems(config)
        found.problems += nemo_path_problems(config)
    elif found.hf_config is not None:
        found.problems += position_problems(config, found.hf_config)
    if packages:
        found.problems += function_problems(config)
    if packages and config.engine == "megatron":
        found.problems += package_problems(config)
    if platform is not None:
        found.problems += platform_problems(config, platform)
    return found


def checked_inputs(config: RunConfig, platform: Platform | None = None) -> RunInputs:
    """The inputs of a run on the native engine that passes `check_run`. Raises UserError with every problem."""
    found = check_run(config, platform=platform)
    raise_problems(found.problems)
    assert found.inputs is not None
    return found.inputs


def check_evaluation(
    config: EvaluateConfig, platform: Platform, out: Mapping[str, Path]
) -> tuple[Tokenizer, PromptData]:
    """Read tokenizer and problems of an evaluation. Raises UserError with everything that is wrong.

    ``out``: the files that the evaluation writes, by the keys that name them.
    """
    problems = [*path_problems(config.model), *_layout_problems(config), *platform_problems(config, platform)]
    problems += [problem for key, path in out.items() for problem in file_problems(key, path)]
    if config.rollout.engine != "megatron":
        problems.append(f"rollout.engine={config.rollout.engine}: evaluations generate with megatron; use that")
    checkpoint = config.evaluation.checkpoint
    if checkpoint is not None:
        problems += [f"evaluation.checkpoint={problem}" for problem in checkpoint_problems(Path(checkpoint))]
    tokenizer = data = None
    try:
        find_verifier(config.data.reward)
        tokenizer = read_tokenizer(config.model)
        if config.data.eval is None:
            raise UserError(
                "data.eval=null: there are no problems; name a file, or choose a benchmark (benchmark=gsm8k)"
            )
        data = PromptData(config.data.eval, config.data, tokenizer, field="data.eval", split=config.data.eval_split)
        problems += length_problems(config.rollout.max_new_tokens, positions(config.model), data, "data.eval")
        problems += vocabulary_problems(config.model, tokenizer, vocab_size(config.model))
        problems += prompt_token_problems(data, vocab_size(config.model), "data.eval")
    except UserError as error:
        problems += str(error).splitlines()
    raise_problems(problems)
    assert tokenizer is not None and data is not None
    return tokenizer, data


def check_export(config: RunConfig, checkpoint: Path, out: Path) -> None:
    """Raises UserError if ``checkpoint`` cannot be written as a Hugging Face folder to ``out``."""
    raise_problems(
        [
            *checkpoint_problems(checkpoint),
            *out_problems(out),
            *path_problems(config.model),
            *_layout_problems(config),
        ]
    )


def _layout_problems(config: RunConfig | EvaluateConfig) -> list[str]:
    """Problems with the layout, if the model's configuration is known; otherwise `path_problems` reports that."""
    try:
        return uneven_stage_problems(config.parallel) or layout_problems(config.parallel, known_config(config.model))
    except UserError:
        return []
