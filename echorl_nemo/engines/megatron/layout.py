"""The parallel layout of a run: what it is, and what of model and batch does not divide by it."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from echorl_nemo.engines.megatron.launch import external_world_size
from echorl_nemo.errors import UserError, first_line
from echorl_nemo.ops.ranges import Interval
from echorl_nemo.schema import EvaluateConfig, LayoutConfig, ModelConfig, ParallelConfig, RunConfig

SAME_SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""What `model.architecture` and the model's own config.json must agree in."""


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
"""What in a config.json is a number of at least 1, where it is there."""
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Those that every model has."""
NUMBERS = {
    "rms_norm_eps": Interval("(0, 1)"),
    "layer_norm_eps": Interval("(0, 1)"),
    "rope_theta": Interval("(0, 1e12]"),
    "attention_dropout": Interval("[0, 1)"),
    "sliding_window": Interval("[1, 1e9]"),
    "partial_rotary_factor": Interval("(0, 1]"),
}
SCALES = {
    "factor": Interval("(0, 1e6]"),
    "low_freq_factor": Interval("(0, 1e6]"),
    "high_freq_factor": Interval("(0, 1e6]"),
    "original_max_position_embeddings": Interval("[1, 1e9]"),
    "attention_factor": Interval("(0, 1e6]"),
}
"""Ranges of what the attention is computed with, where it is there; the latter of rope_scaling."""


def world_size(config: RunConfig | EvaluateConfig) -> int:
    """Ranks of the run. Fills in what `parallel` leaves open. Raises UserError if torchrun or srun started another
    number."""
    outer = external_world_size()
    gpus = outer or _gpus_here(config.parallel.device)
    resolve_layout(config.parallel, config.model, gpus, starts_ranks=outer is None)
    layout = config.parallel
    replica = ranks_per_replica(layout)
    if layout.data is None:
        layout.data = 1 if outer is None else max(1, outer // replica)
    world = replica * layout.data
    if outer is not None and outer != world:
        raise UserError(
            f"{outer} ranks were started, but parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} "
            f"x parallel.context={layout.context} x parallel.data={layout.data} is {world}; start {world}, or change "
            "parallel.*"
        )
    return world


def resolve_layout(layout: ParallelConfig, model: ModelConfig, gpus: int, *, starts_ranks: bool) -> None:
    """Replace the zeros of `parallel` by the model's default layout on ``gpus`` GPUs. With ``starts_ranks``, where this
    program starts the ranks, replicas take the other GPUs."""
    if layout.tensor and layout.pipeline:
        return
    if layout.tensor or layout.pipeline:
        layout.tensor, layout.pipeline = max(1, layout.tensor), max(1, layout.pipeline)
        return
    fitting = [count for count in model.layouts if count <= gpus]
    default = model.layouts[max(fitting)] if fitting else LayoutConfig()
    layout.tensor, layout.pipeline = default.tensor, default.pipeline
    layout.expert = max(layout.expert, default.expert)
    if layout.data is None and starts_ranks:
        layout.data = max(1, gpus // ranks_per_replica(layout))


def ranks_per_replica(layout: ParallelConfig) -> int:
    """Ranks of one replica of the policy."""
    return layout.tensor * layout.pipeline * layout.context


def _gpus_here(device: str) -> int:
    return 1 if device == "cpu" else max(1, torch.cuda.device_count())


def arithmetic_problems(config: RunConfig) -> list[str]:
    """What does not divide in the step."""
    trainer, group_size, data = config.trainer, config.rollout.group_size, config.parallel.data or 1
    problems = []
    if group_size < 2:
        problems.append(
            f"rollout.group_size={group_size}: algo.estimator={config.algo.estimator} compares the rollouts of a "
            "group; use 2 or more"
        )
    if trainer.prompts_per_step % trainer.minibatch_prompts:
        problems.append(
            f"trainer.prompts_per_step={trainer.prompts_per_step} is not divisible by "
            f"trainer.minibatch_prompts={trainer.minibatch_prompts}; use a multiple of it"
        )
    if trainer.minibatch_prompts % data:
        problems.append(
            f"trainer.minibatch_prompts={trainer.minibatch_prompts} groups are not divisible by "
            f"parallel.data={data}: a group is never split over replicas; use a multiple of {data}"
        )
    return problems


def model_problems(layout: ParallelConfig, model: ModelConfig) -> list[str]:
    """Whether the model can be read, is the one that `model.architecture` describes, and divides by the layout."""
    problems = path_problems(model)
    try:
        return problems + layout_problems(
            layout, described_config(model) if model.architecture else read_hf_config(model)
        )
    except UserError:  # `path_problems` has reported it
        return problems


def path_problems(model: ModelConfig) -> list[str]:
    """Whether the model at `model.path` can be read, and is the one that `model.architecture` describes."""
    try:
        own = read_hf_config(model)
    except UserError as error:
        return [str(error)]
    return [
        f"model.path={model.path}: its config.json has {name}={getattr(own, name, None)}, model.architecture "
        f"{model.architecture[name]}; choose the model= that goes with the path, or model=hf"
        for name in SAME_SIZES
        if name in model.architecture and getattr(own, name, None) != model.architecture[name]
    ]


def layout_problems(layout: ParallelConfig, hf_config: PretrainedConfig) -> list[str]:
    """What of the model does not divide by the parallel sizes."""
    tensor, pipeline, expert = layout.tensor, layout.pipeline, layout.expert
    kv_heads = getattr(hf_config, "num_key_value_heads", hf_config.num_attention_heads)
    problems = []
    # fewer key-value heads than ranks are copied to several ranks
    if kv_heads % tensor and tensor % kv_heads:
        problems.append(
            f"parallel.tensor={tensor}: the model's {kv_heads} key-value heads are neither divisible by it nor a "
            f"divisor of it; use a divisor or a multiple of {kv_heads}"
        )
    experts = number_of_experts(hf_config)
    wanted = [
        ("attention heads", hf_config.num_attention_heads, "parallel.tensor", tensor),
        # GPT-2 and its like name it otherwise, and Megatron checks it again
        ("feed-forward width", getattr(hf_config, "intermediate_size", tensor), "parallel.tensor", tensor),
        ("vocabulary entries", hf_config.vocab_size, "parallel.tensor", tensor),
        ("layers", hf_config.num_hidden_layers, "parallel.pipeline", pipeline),
    ]
    if experts:
        wanted.append(("experts", experts, "parallel.expert", expert))
        if tensor > 1 and not layout.sequence:
            problems.append(
                f"parallel.sequence=false: Megatron trains a mixture of experts with parallel.tensor={tensor} only under "
                "sequence parallelism; use true, or parallel.tensor=1"
            )
        if layout.data is not None and (tensor * layout.context * layout.data) % expert:
            problems.append(
                f"parallel.expert={expert}: experts are spread over tensor x context x data = "
                f"{tensor * layout.context * layout.data} ranks, which are not divisible by it; use a divisor"
            )
    elif expert > 1:
        problems.append(f"parallel.expert={expert}: the model has no experts; use 1")
    return problems + [
        f"{key}={size}: the model's {count} {what} are not divisible by it; use a divisor of {count}"
        for what, count, key, size in wanted
        if count % size
    ]


def number_of_experts(hf_config: PretrainedConfig) -> int:
    """Experts of a layer, 0 of a dense model."""
    return int(getattr(hf_config, "num_experts", None) or getattr(hf_config, "num_local_experts", None) or 0)


def read_hf_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration of the model at `model.path`. Raises UserError if there is none, or one with impossible
    sizes."""
    try:
        hf_config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises anything for a damaged config.json
        words = first_line(error)
        cause = words if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {words}"
        raise UserError(
            f"model.path={model.path}: no Hugging Face model can be read: {cause} Name a folder that holds it, or an "
            "id of the hub where the hub can be reached"
        ) from error
    if wrong := [f"{name}={value!r}" for name, value in _impossible(hf_config)]:
        raise UserError(f"model.path={model.path}: its config.json has {', '.join(wrong)}; correct it")
    return hf_config


def _impossible(hf_config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Names and values of a configuration that no model can have."""
    for name in SIZES:
        value = getattr(hf_config, name, 1)
        missing = value is None and name in NEEDED
        if missing or (value is not None and (type(value) is not int or value < 1)):
            yield name, value
    for name, interval in NUMBERS.items():
        value = getattr(hf_config, name, None)
        if value is not None and value not in interval:
            yield name, value
    scaling = getattr(hf_config, "rope_scaling", None)
    if isinstance(scaling, dict):
        for name, value in scaling.items():
            if name in SCALES and value not in SCALES[name]:
                yield f"rope_scaling.{name}", value


def known_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration that `model.architecture` describes, or that of `model.path`. Raises UserError."""
    return described_config(model) if model.architecture else read_hf_config(model)


def described_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration that `model.architecture` describes. Raises UserError for an architecture that is not known."""
    values: dict[str, Any] = dict(model.architecture)
    try:
        return AutoConfig.for_model(values.pop("model_type", ""), **values)
    except ValueError as error:
        raise UserError(
            f"model.architecture: {str(error).splitlines()[0]}; give model_type and architectures"
        ) from error
