"""What differs between the tested releases of Megatron-Core, Megatron-Bridge and transformers.

Each function says which releases it bridges, and when it is not needed any more. docs/compatibility.md lists what was
run with which release. Nothing heavy is imported before a function is called.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

TESTED = {
    "megatron-core": ("0.16.1", "0.19.2"),
    "megatron-bridge": ("0.3.1", "0.6.2"),
    "transformers": ("4.57.6", "5.12.1"),
}
"""The oldest and the newest tested release of each package; setup.cfg states the same range."""

GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the class that does exactly what tokenizer.json says: of transformers 4 and 5."""


def untested_releases() -> list[str]:
    """A sentence about each installed package whose release lies outside `TESTED`."""
    found = []
    for package, (oldest, newest) in TESTED.items():
        try:
            release = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not Version(oldest).release[:2] <= Version(release).release[:2] <= Version(newest).release[:2]:
            found.append(
                f"{package} {release} is not a tested release: {oldest} to {newest} are; see docs/compatibility.md"
            )
    return found


def import_before_absent_packages() -> None:
    """Import the modules of Megatron-Core that decide at import whether a package is there, before empty stand-ins of
    absent packages make them decide wrongly.

    The hybrid models are imported by Megatron-Bridge from 0.4 on; until Megatron-Core 0.16 they lie elsewhere, and no
    one needs them.
    """
    for module in ("megatron.core.ssm.mamba_mixer", "megatron.core.models.hybrid.hybrid_layer_specs"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("megatron.core"):
                raise


def load_tokenizer(path: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a Hugging Face folder, of the class that its tokenizer_config.json names.

    transformers 5 replaces a generic class by that of the model's family (tokenization_auto.py,
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS), which splits texts otherwise than tokenizer.json, without an error;
    transformers 4 does not know the name that 5 writes. Not needed once transformers keeps a generic class.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if get_tokenizer_config(path).get("tokenizer_class") in GENERIC_TOKENIZERS:
        return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def rope_settings(hf_config: Any) -> dict[str, Any]:
    """Kind, base and scaling of a model's rotary position embedding, as one dictionary with `rope_type` and
    `rope_theta`.

    transformers 5 keeps them so, as `rope_parameters`; transformers 4 as `rope_theta` and an optional `rope_scaling`.
    Not needed without transformers 4.
    """
    settings = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta", getattr(hf_config, "rope_theta", None))
    return {**settings, "rope_type": kind, "rope_theta": theta}


def inverse_frequencies(hf_config: Any) -> tuple[Any, float]:
    """Inverse frequencies [rotary width / 2] of a model's rotary position embedding, and the factor of its cosine and
    sine, by transformers' own functions. Raises KeyError for a kind that transformers does not know.

    transformers 5 has no function for the kind `default`, whose formula each of its models repeats.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = rope_settings(hf_config)
    kind = settings["rope_type"]
    if kind != "default" or kind in ROPE_INIT_FUNCTIONS:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
        return frequencies, factor
    width = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    width = int(width * settings.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    return 1.0 / settings["rope_theta"] ** exponents, 1.0


def saved_weights(model: Any) -> dict[str, Any]:
    """The weights of a transformers model under the names and in the shapes that a folder holds.

    transformers 5 joins the experts of a layer in memory, and splits them again as it saves (core_model_loading.py);
    transformers 4 has no difference.
    """
    if importlib.util.find_spec("transformers.core_model_loading") is None:
        return dict(model.state_dict())
    loading = importlib.import_module("transformers.core_model_loading")
    return dict(loading.revert_weight_conversion(model, model.state_dict()))


def maps_local_experts() -> bool:
    """Whether Megatron-Bridge loads and exports experts that are separate modules, as they are without Transformer
    Engine.

    0.6 does; 0.3 gives each rank the first rank's experts, and cannot name them in an export (line 677 of
    param_mapping.py in 0.3.1); 0.4 and 0.5 were not run. Not needed without them.
    """
    return Version(importlib.metadata.version("megatron-bridge")) >= Version("0.6")


def common_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors and objects of single ranks.

    Megatron-Core 0.19 keeps it among the sharded objects, 0.16 in common.pt, and 0.19 reads both (serialization.py,
    load_common_state_dict). Not needed without 0.16.
    """
    from megatron.core import dist_checkpointing

    if _needs_common_strategy(checkpoint):
        return _common_state_inside(checkpoint)
    return dict(dist_checkpointing.load_common_state_dict(str(checkpoint)))


def load_options(checkpoint: Path) -> dict[str, Any]:
    """Arguments of `dist_checkpointing.load` with which Megatron-Core 0.16 finds the `common_state` of 0.19."""
    if not _needs_common_strategy(checkpoint):
        return {}
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class CommonStateInside(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str) -> dict[str, Any]:
            return _common_state_inside(Path(checkpoint_dir))

    return {"common_strategy": CommonStateInside()}


def _needs_common_strategy(checkpoint: Path) -> bool:
    """Whether the installed Megatron-Core looks for a common.pt that ``checkpoint`` does not have."""
    from megatron.core import dist_checkpointing

    takes_strategy = "common_strategy" in inspect.signature(dist_checkpointing.load).parameters
    return takes_strategy and not (checkpoint / "common.pt").is_file()


def _common_state_inside(checkpoint: Path) -> dict[str, Any]:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    state: dict[str, Any] = {key: io.BytesIO()}
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    found = state[key]
    if isinstance(found, io.BytesIO):
        found.seek(0)
        found = torch.load(found, weights_only=True)
    return dict(found[0])


def define_safe_load_from_bytes() -> None:
    """Define the function by which Megatron-Core 0.17 and later name the bytes of a tensor in a checkpoint
    (safe_globals.py), so that Megatron-Core 0.16 reads their checkpoints. Not needed without 0.16."""
    import torch
    from megatron.core import safe_globals

    def safe_load_from_bytes(content: bytes) -> Any:
        return torch.load(io.BytesIO(content), weights_only=True)

    vars(safe_globals).setdefault("safe_load_from_bytes", safe_load_from_bytes)


@dataclass(frozen=True)
class CheckpointWriter:
    """The writer of Megatron-Core's checkpoints that runs beside training."""

    save_options: dict[str, Any]
    """Arguments of `dist_checkpointing.save` that choose it."""
    calls_queue: Callable[[], Any]
    """Makes the queue that its requests go into."""
    results_module: Any
    """The module whose `_results_queue` it reports through."""


def checkpoint_writer() -> CheckpointWriter:
    """The writer of nvidia-resiliency-ext if Megatron-Core knows it and it is installed, else Megatron-Core's own.

    Megatron-Core 0.17 and later default to the former, and will remove the latter; 0.16 knows only its own. Not needed
    without Megatron-Core 0.16 where nvidia-resiliency-ext can be installed.
    """
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

    if not hasattr(torch_strategies, "get_async_strategy"):
        return CheckpointWriter({}, async_utils.AsyncCallsQueue, filesystem_async)
    if not _has_resiliency_extension():
        return CheckpointWriter({"async_strategy": "mcore"}, async_utils.AsyncCallsQueue, filesystem_async)
    core, files = (
        importlib.import_module(f"nvidia_resiliency_ext.checkpointing.async_ckpt.{name}")
        for name in ("core", "filesystem_async")
    )
    return CheckpointWriter({"async_strategy": "nvrx"}, lambda: core.AsyncCallsQueue(persistent=False), files)


def _has_resiliency_extension() -> bool:
    """Whether a release of nvidia-resiliency-ext is installed that Megatron-Core takes."""
    from megatron.core.dist_checkpointing.strategies import nvrx

    try:
        release = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return False
    return Version(release) >= Version(nvrx.NVRX_MIN_VERSION)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used. Its package without the CUDA libraries, an empty one, is there and raises
    RuntimeError when it is imported; releases up to 2.16 do."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:  # the stand-in of an absent package has no file
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError):
        return False
    return True
