"""Whether Megatron-Bridge can build a model and take its weights, found before a rank starts.

The model is built on the meta device, where tensors have shapes and no memory, in a process of its own: a library that
fails there, in whatever way, costs one line and no rank.
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

from echorl_nemo.engines.megatron.model_files import weight_problems
from echorl_nemo.engines.megatron.model_settings import attention_settings, set_on_provider, settings_problems
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.schema import ModelConfig, ParallelConfig

SECONDS = 300.0
"""Enough for the largest model; more, and the check is left to the ranks."""
NOT_MAPPED = ("inv_freq", "_extra_state")
"""Ends of names of what is no weight."""


def rehearse(model: ModelConfig, hf_config: PretrainedConfig, platform: Platform) -> list[str]:
    """Every reason why the model cannot be trained by this engine on this platform."""
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
        os.dup2(nowhere.fileno(), 2)  # the libraries' own words: what they raise is in the answer
        try:
            problems = settings_problems(hf_config, model.path) or weight_problems(model, hf_config)
        except Exception as error:  # noqa: BLE001  of whatever transformers makes of a config.json
            problems = [_message(model, f"transformers cannot build it: {_words(error)}", "correct its config.json")]
        if not problems:
            try:
                problems = _build_problems(model, hf_config, platform)
            except Exception as error:  # noqa: BLE001  of whatever Megatron-Bridge and Megatron make of a model
                what = f"a {hf_config.model_type} cannot be built by Megatron-Bridge here: {_words(error)}"
                problems = [_message(model, what, "use an architecture that is listed in README")]
        sender.send(problems)


def _build_problems(model: ModelConfig, hf_config: PretrainedConfig, platform: Platform) -> list[str]:
    """Weights of the model without a place in Megatron's, and the reverse."""
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
            set_on_provider(provider, settings)

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
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =-*\u2717")]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(" :")
