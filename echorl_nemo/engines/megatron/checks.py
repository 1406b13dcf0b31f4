"""Everything about a run that can be checked before a rank starts."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.echo import boundary_ids
from echorl_nemo.engines.megatron.layout import (
    arithmetic_problems,
    model_problems,
    number_of_experts,
    read_hf_config,
)
from echorl_nemo.engines.megatron.model_files import prompt_problems, token_problems
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.engines.megatron.rehearsal import rehearse
from echorl_nemo.errors import UserError
from echorl_nemo.report.config import CONFIG_FILE, FAILURES_FILE, METRICS_FILE, REPORT_FILE, ROLLOUTS_FILE
from echorl_nemo.resilience.checkpoints import MANIFEST
from echorl_nemo.resilience.lock import LOCK_FILE
from echorl_nemo.resilience.watchdog import HEARTBEAT_FILE
from echorl_nemo.rewards import find_verifier
from echorl_nemo.rollout.trtllm.api import refused_problems
from echorl_nemo.schema import EvaluateConfig, ModelConfig, RunConfig


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts."""

    tokenizer: Tokenizer
    train_data: PromptData
    eval_data: PromptData | None
    boundary_ids: tuple[int, ...]


RUN_FOLDERS = ("checkpoints", "export", "tensorboard", "stacks", "skipped")
RUN_FILES = (
    *RUN_FOLDERS, CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, FAILURES_FILE, REPORT_FILE, HEARTBEAT_FILE, LOCK_FILE,
    "requeue",
)  # fmt: skip
"""What a run writes into its folder."""


def check(config: RunConfig, platform: Platform | None = None) -> Inputs:
    """Read tokenizer, model configuration and data, and raise UserError listing every problem of the run; with
    ``platform`` those of the model on it, too."""
    problems, inputs = find_problems(config)
    if platform is not None:
        problems += platform_problems(config, platform)
    if problems:
        raise UserError("\n".join(problems))
    assert inputs is not None
    return inputs


def find_problems(config: RunConfig) -> tuple[list[str], Inputs | None]:
    """Every problem of a run on this engine, and what it reads, where that can be read."""
    problems = [
        *engine_problems(config),
        *arithmetic_problems(config),
        *rollout_problems(config),
        *package_problems(config),
        *run_dir_problems(config),
        *model_problems(config.parallel, config.model),
    ]
    found, inputs = read_inputs(config)
    return problems + found, inputs


def engine_problems(config: RunConfig) -> list[str]:
    """What the native engine does not do, and the other engines do."""
    problems = []
    if config.rollout.engine == "vllm":
        problems.append("rollout.engine=vllm: only NeMo-RL has it; use megatron or trtllm, or engine=nemo_rl")
    if config.parallel.context > 1:
        problems.append(
            f"parallel.context={config.parallel.context}: the native engine does not split sequences; use 1, or "
            "engine=nemo_rl"
        )
    return problems


def platform_problems(config: RunConfig | EvaluateConfig, platform: Platform) -> list[str]:
    """Why the model cannot be built here, and what Megatron-Bridge 0.3.1 cannot do with a mixture of experts whose
    layers are not Transformer Engine's."""
    try:
        hf_config = read_hf_config(config.model)
    except UserError:  # one of the problems already
        return []
    problems = []
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of each node finds what all would
        problems += rehearse(config.model, hf_config, platform)
    if platform.transformer_engine or not number_of_experts(hf_config):
        return problems
    if config.parallel.expert > 1:
        problems.append(
            f"parallel.expert={config.parallel.expert}: without Transformer Engine each rank would load the first "
            "rank's experts; use 1, or a machine that has it"
        )
    if isinstance(config, RunConfig) and config.trainer.export:
        problems.append(
            "trainer.export=true: without Transformer Engine the experts cannot be written as a Hugging Face folder; "
            "use false, checkpoints are saved all the same"
        )
    return problems


def read_inputs(config: RunConfig) -> tuple[list[str], Inputs | None]:
    """Tokenizer and prompts with what is wrong with them; None where one of them cannot be read."""
    try:
        tokenizer = read_tokenizer(config.model)
    except UserError as error:
        return [str(error), *verifier_problems(config)], None
    problems, data = verifier_problems(config), config.data
    if problems:
        return problems, None
    positions, vocab_size = _positions(config.model), _vocab_size(config.model)
    problems += token_problems(config.model, tokenizer, vocab_size)
    train_data = eval_data = None
    boundaries: tuple[int, ...] = ()
    for name, source, split in (("train", data.train, data.train_split), ("eval", data.eval, data.eval_split)):
        if source is None:
            continue
        try:
            prompts = PromptData(source, data, tokenizer, field=f"data.{name}", split=split)
        except UserError as error:
            problems += str(error).splitlines()
            continue
        problems += length_problems(config.rollout.max_new_tokens, positions, prompts, f"data.{name}")
        problems += prompt_problems(prompts, vocab_size, f"data.{name}")
        if name == "train":
            train_data = prompts
            problems += packing_problems(config, prompts)
        else:
            eval_data = prompts
    try:
        boundaries = boundary_ids(tokenizer, config.echorl.boundary)
    except ValueError as error:
        problems.append(str(error))
    if train_data is None:
        return problems, None
    return problems, Inputs(tokenizer, train_data, eval_data, boundaries)


def verifier_problems(config: RunConfig) -> list[str]:
    """Rewards that are not known."""
    problems = []
    for name in (config.data.reward, *(extra.name for extra in config.data.extra_rewards)):
        try:
            find_verifier(name)
        except UserError as error:
            problems.append(f"data.reward or data.extra_rewards: {error}")
    return problems


def read_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer of `model.path`, as `model` says. Raises UserError if there is none."""
    return Tokenizer(
        model.path,
        trust_remote_code=model.trust_remote_code,
        chat_template=model.chat_template,
        stop_tokens=model.stop_tokens,
        keep_special_tokens=model.keep_special_tokens,
        verify=model.verify == "auto",
    )


def check_evaluation(
    config: EvaluateConfig, platform: Platform, out: Mapping[str, Path]
) -> tuple[Tokenizer, PromptData]:
    """Read tokenizer and problems, and raise UserError listing everything that is wrong with an evaluation, which
    writes the files ``out``, by the keys that name them."""
    problems = [*model_problems(config.parallel, config.model), *platform_problems(config, platform)]
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
            raise UserError("data.eval is null: name the problems, or choose a benchmark (benchmark=gsm8k)")
        data = PromptData(config.data.eval, config.data, tokenizer, field="data.eval", split=config.data.eval_split)
        problems += length_problems(config.rollout.max_new_tokens, _positions(config.model), data, "data.eval")
        vocab_size = _vocab_size(config.model)
        problems += token_problems(config.model, tokenizer, vocab_size)
        problems += prompt_problems(data, vocab_size, "data.eval")
    except UserError as error:
        problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(problems))
    assert tokenizer is not None and data is not None
    return tokenizer, data


def run_dir_problems(config: RunConfig) -> list[str]:
    """Whether the run folder's files would be lost, or cannot be written."""
    run_dir = Path(config.trainer.run_dir)
    if not config.trainer.run_dir.strip():
        return ["trainer.run_dir is empty; name a folder"]
    parent = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not parent.is_dir():
        return [f"trainer.run_dir={run_dir}: {parent} is a file; name a folder"]
    kinds = {name: (run_dir / name).is_dir() for name in RUN_FILES if (run_dir / name).exists()}
    if wrong := [name for name, is_folder in kinds.items() if is_folder != (name in RUN_FOLDERS)]:
        kind = "file" if wrong[0] in RUN_FOLDERS else "folder"
        return [f"trainer.run_dir={run_dir}: {wrong[0]} in it is a {kind}; move it away, or name another folder"]
    if not (run_dir / METRICS_FILE).exists() and not any((run_dir / "checkpoints").glob("step-*")):
        return []
    if not config.trainer.resume:
        return [
            f"trainer.run_dir={run_dir} holds a run already; set trainer.resume=true to go on with it, "
            "or name another folder"
        ]
    return []


def checkpoint_problems(checkpoint: Path) -> list[str]:
    """Whether a folder is a complete checkpoint; whether its files are sound is looked at where they are read."""
    if (checkpoint / MANIFEST).is_file():
        return []
    return [f"{checkpoint} is not a complete checkpoint: name a folder run_dir/checkpoints/step-NNNNNN"]


def file_problems(key: str, path: Path) -> list[str]:
    """Whether a file of results, which ``key`` names, cannot be written."""
    if path.is_dir():
        return [f"{key}={path}: a folder of that name is there; name a file"]
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        return [f"{key}={path}: {parent} is not a folder; name another file"]
    try:
        with tempfile.TemporaryFile(dir=parent):
            return []
    except OSError as error:
        return [f"{key}={path}: it cannot be written ({error.strerror}); name a file in a folder of yours"]


def out_problems(out: Path) -> list[str]:
    """Whether a model would be written over another."""
    if out.exists() and not out.is_dir():
        return [f"--out={out} is a file; name a folder"]
    if out.is_dir() and any(out.iterdir()):
        return [f"--out={out} holds files already; name another folder"]
    return []


def length_problems(budget: int, positions: int | None, data: PromptData, name: str) -> list[str]:
    """Whether prompt and response fit the model's ``positions``; None where they are not known."""
    longest = data.longest + budget
    if positions is not None and longest > positions:
        return [
            f"rollout.max_new_tokens={budget}: with the longest prompt of {name}, "
            f"{data.longest} tokens, that is {longest}, the model has {positions} positions; lower it"
        ]
    return []


def _positions(model: ModelConfig) -> int | None:
    """Largest number of positions of the model; None if it has no limit, or cannot be read, which `model_problems`
    reports."""
    try:
        return getattr(read_hf_config(model), "max_position_embeddings", None)
    except UserError:
        return None


def _vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding; without a limit where they cannot be read, which `model_problems` says."""
    try:
        return int(getattr(read_hf_config(model), "vocab_size", sys.maxsize))
    except UserError:
        return sys.maxsize


def rollout_problems(config: RunConfig) -> list[str]:
    """What the rollout engine cannot do, and settings that contradict each other about whose numbers are taken."""
    rollout, algo, echorl = config.rollout, config.algo, config.echorl
    problems = []
    if rollout.engine == "trtllm":
        problems += refused_problems(rollout.trtllm.extra, "rollout.trtllm.extra")
        if not rollout.trtllm.colocated:
            problems.append(
                "rollout.trtllm.colocated=false: weights travel as handles of memory on a GPU that trainer and engine "
                "share, and engines elsewhere get none; use true"
            )
        if rollout.trtllm.timeout_minutes >= config.trainer.timeout_minutes:
            problems.append(
                f"rollout.trtllm.timeout_minutes={rollout.trtllm.timeout_minutes:g}: the other ranks wait for the "
                f"engine no longer than trainer.timeout_minutes={config.trainer.timeout_minutes}; use less, or raise "
                "that"
            )
        needs = algo.importance == "rollout" or algo.tis_cap or algo.icepop_low or algo.icepop_high
        if needs and rollout.temperature != 1.0:
            problems.append(
                f"rollout.temperature={rollout.temperature}: TensorRT-LLM's log-probs are those of temperature 1, and "
                "algo.importance=rollout, tis_cap and icepop need those that were sampled from; use 1"
            )
    if algo.importance == "rollout" and echorl.enabled and echorl.entropy_source != "rollout":
        problems.append(
            "algo.importance=rollout skips the scoring pass, which gives the entropies of "
            "echorl.entropy_source=policy; use entropy_source=rollout, importance=policy, or echorl=off"
        )
    return problems


def package_problems(config: RunConfig) -> list[str]:
    """What this environment, that of the ranks, lacks for the run."""
    problems = []
    for field, package in (("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")):
        value, spec = getattr(config.logger, field), importlib.util.find_spec(package)
        if value is not None and (spec is None or spec.origin is None):  # no more than a stand-in
            problems.append(f"logger.{field}={value}: the package {package} is not installed; install it, or use null")
    if config.rollout.engine == "trtllm" and importlib.util.find_spec("tensorrt_llm") is None:
        problems.append(
            "rollout.engine=trtllm: the package tensorrt_llm is not installed; run in a container that carries it, "
            "see docs/tensorrt_llm.md, or use rollout.engine=megatron"
        )
    return problems


def packing_problems(config: RunConfig, data: PromptData) -> list[str]:
    """Whether every rollout fits a packed row."""
    row, longest = config.trainer.pack_tokens, data.longest + config.rollout.max_new_tokens
    if 0 < row < longest:
        return [
            f"trainer.pack_tokens={row}: a rollout may have {longest} tokens, the longest prompt's {data.longest} and "
            f"rollout.max_new_tokens={config.rollout.max_new_tokens}; use {longest} or more, or 0 to pad"
        ]
    return []
