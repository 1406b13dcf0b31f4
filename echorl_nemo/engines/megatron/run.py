"""The commands of the native engine: check the run, then start its ranks."""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from echorl_nemo.checks.commands import check_evaluation, check_export, checked_inputs
from echorl_nemo.data.inputs import RunInputs
from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.engines.megatron.launch import launch
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.engines.megatron.platform import Platform, detect_platform
from echorl_nemo.releases import untested_releases
from echorl_nemo.resilience.stop import StopSignals
from echorl_nemo.schema import EvaluateConfig, RunConfig


def train(config: RunConfig, config_yaml: str, signals: StopSignals) -> int:
    """Check the run, start its ranks, and train. Returns the exit code: 75 for a run that was asked to stop, has saved,
    and has to be started again.

    ``config_yaml``: the text that the run folder keeps. ``signals`` must be listening already. Raises UserError with
    every problem that the checks find, before a rank starts.
    """
    _prepare_command()
    world = world_size(config)
    platform = detect_platform(config.parallel.device)
    inputs = checked_inputs(config, platform)
    import echorl_nemo.engines.megatron.worker  # noqa: F401  heavy: once, before ranks are forked

    return launch(
        partial(_train_rank, config, config_yaml, inputs, platform, signals),
        world,
        platform,
        timeout_minutes=config.trainer.timeout_minutes,
        signals=signals,
    )


def evaluate(config: EvaluateConfig) -> int:
    """Check the evaluation, start its ranks, and evaluate. Returns the exit code; raises UserError like `train`."""
    return _examine(config, _evaluate_rank, {"evaluation.out": Path(config.evaluation.out)})


def analyze(config: EvaluateConfig) -> int:
    """Check the analysis, start its ranks, and write step-entropy profiles. Returns the exit code; raises UserError
    like `train`."""
    out = Path(config.analysis.out)
    files = {f"analysis.out with {suffix}": out.with_suffix(suffix) for suffix in (".json", ".png")}
    return _examine(config, _analyze_rank, files)


def export(config: RunConfig, checkpoint: Path, out: Path) -> int:
    """Write the policy of a checkpoint as a Hugging Face folder. Returns the exit code; raises UserError like
    `train`."""
    _prepare_command()
    config.parallel.data = None  # one replica is enough
    world = world_size(config)
    check_export(config, checkpoint, out)
    platform = detect_platform(config.parallel.device)
    import echorl_nemo.engines.megatron.worker  # noqa: F401  heavy: once, before ranks are forked

    return launch(
        partial(_export_rank, config, checkpoint, out, platform),
        world,
        platform,
        timeout_minutes=config.trainer.timeout_minutes,
    )


def _examine(config: EvaluateConfig, rank: Callable[..., int], out: Mapping[str, Path]) -> int:
    _prepare_command()
    world = world_size(config)
    platform = detect_platform(config.parallel.device)
    tokenizer, data = check_evaluation(config, platform, out)
    import echorl_nemo.engines.megatron.analyze
    import echorl_nemo.engines.megatron.evaluate  # noqa: F401  heavy: once, before ranks are forked

    return launch(
        partial(rank, config, tokenizer, data, platform),
        world,
        platform,
        timeout_minutes=config.evaluation.timeout_minutes,
    )


def _train_rank(
    config: RunConfig,
    config_yaml: str,
    inputs: RunInputs,
    platform: Platform,
    signals: StopSignals,
    closers: ExitStack,
) -> int:
    _prepare_rank(config.parallel.device)
    from echorl_nemo.engines.megatron.worker import run_rank

    return run_rank(config, config_yaml, inputs, platform, signals, closers)


def _export_rank(config: RunConfig, checkpoint: Path, out: Path, platform: Platform, _: ExitStack) -> int:
    _prepare_rank(config.parallel.device)
    from echorl_nemo.engines.megatron.worker import export_rank

    export_rank(config, checkpoint, out, platform)
    return 0


def _evaluate_rank(
    config: EvaluateConfig, tokenizer: Tokenizer, data: PromptData, platform: Platform, closers: ExitStack
) -> int:
    _prepare_rank(config.parallel.device)
    from echorl_nemo.engines.megatron.evaluate import run_rank

    run_rank(config, tokenizer, data, platform, closers)
    return 0


def _analyze_rank(
    config: EvaluateConfig, tokenizer: Tokenizer, data: PromptData, platform: Platform, closers: ExitStack
) -> int:
    _prepare_rank(config.parallel.device)
    from echorl_nemo.engines.megatron.analyze import run_rank

    run_rank(config, tokenizer, data, platform, closers)
    return 0


def _prepare_command() -> None:
    silence_library_warnings()
    for sentence in untested_releases():
        logging.getLogger(__name__).warning("%s", sentence)


def _prepare_rank(device: str) -> None:
    """Repeat the settings and stand-ins of the process that started this rank: a spawned rank does not inherit them."""
    silence_library_warnings()
    detect_platform(device)


def silence_library_warnings() -> None:
    """Turn off the libraries' warnings about each other's deprecations and about packages that are not needed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive a fork
    # warnings of torch also appear under cpu.py's name, whose function mode calls torch
    warnings.filterwarnings("ignore", module=r"megatron|torch|transformers|echorl_nemo\.engines\.megatron\.cpu")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("megatron").setLevel(logging.WARNING)
    for name in (
        "megatron.bridge.utils.fusions",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron.core.models.gpt.gpt_model",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("megatron.bridge.utils.import_utils").disabled = True  # it sets its level when it is imported
