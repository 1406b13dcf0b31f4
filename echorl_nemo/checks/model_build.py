"""Checks whether Megatron-Bridge can build a model and import its weights, before a rank starts.

The model is built on the meta device, where tensors have shapes and no memory, in a separate process: whatever a
library does there ends in one error line.
"""

import multiprocessing
import os
import sys
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors
from transformers import PretrainedConfig

from echorl_nemo.checks.hf_config import number_of_experts, read_hf_config
from echorl_nemo.checks.model import position_encoding_problems, weight_problems
from echorl_nemo.engines.megatron.model_settings import (
    MAPPED_FAMILIES,
    apply_to_provider,
    attention_settings,
    attention_windows,
)
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.errors import UserError
from echorl_nemo.releases import maps_local_experts
from echorl_nemo.schema import EvaluateConfig, ModelConfig, ParallelConfig, RunConfig

SECONDS = 300.0
"""Time limit of the check, seconds. After it the model counts as sound, and the ranks find what is wrong."""
NOT_MAPPED = ("inv_freq", "_extra_state")
"""Suffixes of names in weight files that are not weights."""


def platform_problems(config: RunConfig | EvaluateConfig, platform: Platform) -> list[str]:
    """Problems if the native engine cannot build the model on ``platform``, or if the model is a mixture of experts and
    Megatron-Bridge needs Transformer Engine for it."""
    try:
        hf_config = read_hf_config(config.model)
    except UserError:  # `path_problems` reports it
        return []
    problems = []
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of each node is enough
        problems += build_problems(config.model, hf_config, platform)
    if platform.transformer_engine:
        return problems + _split_window_problems(config.parallel, hf_config)
    if not number_of_experts(hf_config) or maps_local_experts():
        return problems
    if config.parallel.expert > 1:
        problems.append(
            f"parallel.expert={config.parallel.expert}: without Transformer Engine each rank would load the first "
            "rank's experts; use 1, a machine that has it, or Megatron-Bridge 0.6"
        )
    if isinstance(config, RunConfig) and config.trainer.export:
        problems.append(
            "trainer.export=true: without Transformer Engine the experts cannot be written as a Hugging Face folder; "
            "use false, checkpoints are saved all the same, or Megatron-Bridge 0.6"
        )
    return problems


def _split_window_problems(layout: ParallelConfig, hf_config: PretrainedConfig) -> list[str]:
    """A problem if a model with an attention window is to be split over context-parallel ranks: Transformer Engine
    passes keys and values on from rank to rank, and refuses a window then."""
    window = next((window for window in attention_windows(hf_config) if window is not None), None)
    if layout.context == 1 or hf_config.model_type not in MAPPED_FAMILIES or window is None:
        return []
    return [
        f"parallel.context={layout.context}: the model has an attention window of {window} tokens, which "
        "Transformer Engine does not split; use 1"
    ]


def build_problems(model: ModelConfig, hf_config: PretrainedConfig, platform: Platform) -> list[str]:
    """Problems because of which this engine cannot train the model on this platform."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_in_a_process, args=(sender, model, hf_config, platform))
    process.start()
    sender.close()
    try:
        answer: list[str] | None = receiver.recv() if receiver.poll(SECONDS) else []
    except EOFError:
        answer = None
    process.kill()
    process.join()
    if answer is None:
        return [f"model.path={model.path}: Megatron-Bridge ends the process that builds the model; use another model"]
    return answer


def _in_a_process(sender: Connection, model: ModelConfig, hf_config: PretrainedConfig, platform: Platform) -> None:
    os.setpgid(0, 0)
    with redirect_stdout(sys.stderr), Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # the libraries print much; what they raise is in the answer
        try:
            problems = position_encoding_problems(hf_config, model.path) or weight_problems(model, hf_config)
        except Exception as error:  # noqa: BLE001  transformers raises anything for a bad config.json
            problems = [_message(model, f"transformers cannot build it: {_words(error)}", "correct its config.json")]
        if not problems:
            try:
                problems = _mapping_problems(model, hf_config, platform)
            except Exception as error:  # noqa: BLE001  Megatron-Bridge and Megatron raise anything for an unusual model
                what = f"a {hf_config.model_type} cannot be built by Megatron-Bridge here: {_words(error)}"
                problems = [_message(model, what, "use an architecture that is listed in README")]
        sender.send(problems)


def _mapping_problems(model: ModelConfig, hf_config: PretrainedConfig, platform: Platform) -> list[str]:
    """Problems with weights that Megatron's model has no place for, and of places that have no weight."""
    from megatron.bridge import AutoBridge  # imports only with the stand-ins that ``platform`` put in place

    from echorl_nemo.engines.megatron.meta_model import meta_model

    bridge: Any = AutoBridge.from_hf_config(type(hf_config).from_dict(hf_config.to_dict()))
    registry = bridge._model_bridge.mapping_registry()
    names = [name for name in _held_names(Path(model.path)) if not name.endswith(NOT_MAPPED)]
    if lost := [name for name in names if registry.hf_to_megatron_lookup(name) is None]:
        what = f"Megatron-Bridge has no place for {lost[0]} and {len(lost) - 1} other weights"
        return [_message(model, what, "use another architecture")]
    if platform.backend != "gloo":  # the layers are Transformer Engine's, which are not built on the meta device
        return []

    def adjust(provider: Any) -> None:
        settings = attention_settings(hf_config)
        if settings is not None:
            apply_to_provider(provider, settings)

    built = meta_model(bridge, ParallelConfig(), stage=0, platform=platform, adjust=adjust)
    own = [name for name, _ in built.named_parameters()]
    if empty := [name for name in own if registry.megatron_to_hf_lookup(name) is None]:
        return [_message(model, f"Megatron-Bridge has no weight for {empty[0]}", "use another architecture")]
    return []


def _held_names(folder: Path) -> list[str]:
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as weights:
            names += weights.keys()
    return names


def _message(model: ModelConfig, what: str, remedy: str) -> str:
    return f"model.path={model.path}: {what}; {remedy}"


def _words(error: BaseException) -> str:
    """The type of an error and the first line of its message that is not decoration."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =-*\u2717")]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(" :")
