"""What would stop a run, found without its GPUs."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PretrainedConfig

from echorl_nemo.engines.megatron import checks
from echorl_nemo.engines.megatron.layout import arithmetic_problems, path_problems, ranks_per_replica, resolve_layout
from echorl_nemo.engines.nemo_aligner import config as aligner
from echorl_nemo.engines.nemo_aligner import overrides as aligner_overrides
from echorl_nemo.engines.nemo_rl import config as nemo_rl
from echorl_nemo.engines.nemo_rl import overrides as nemo_rl_overrides
from echorl_nemo.errors import UserError
from echorl_nemo.plan.estimate import Memory
from echorl_nemo.schema import RunConfig
from echorl_nemo.shipped import CONFIG_DIR

BYTES_OF_A_CHECKPOINT = 14
"""For each parameter: bf16 weights, float32 master weights and two moments."""


def settle(config: RunConfig) -> list[str]:
    """Fill in what `parallel` leaves open, on the GPUs that `cluster` has; what cannot be filled in."""
    layout, cluster = config.parallel, config.cluster
    gpus = cluster.nodes * cluster.gpus_per_node
    resolve_layout(layout, config.model, gpus or 1, starts_ranks=False)
    replica = ranks_per_replica(layout)
    if not gpus:
        layout.data = layout.data or 1
        return []
    replicas = (
        f"parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} x parallel.context={layout.context}"
    )
    have = f"cluster.nodes={cluster.nodes} x cluster.gpus_per_node={cluster.gpus_per_node} are {gpus} GPUs"
    if layout.data is None:
        layout.data = max(1, gpus // replica)
    if replica * layout.data == gpus:
        return []
    return [
        f"{have}, but {replicas} x parallel.data={layout.data} is {replica * layout.data}; use a divisor of {gpus} for "
        "each replica and leave parallel.data open"
    ]


def position_problems(config: RunConfig, hf_config: PretrainedConfig) -> list[str]:
    """Whether the longest prompt that the run allows, and a response, fit the model; where the prompts are not read."""
    prompt, budget = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions is None or prompt + budget <= positions:
        return []
    return [
        f"data.max_prompt_tokens={prompt} and rollout.max_new_tokens={budget} are {prompt + budget} tokens, the model "
        f"has {positions} positions; lower one"
    ]


def layout_warnings(config: RunConfig) -> list[str]:
    """What runs, and slowly."""
    per_node = config.cluster.gpus_per_node
    if per_node and config.parallel.tensor > per_node:
        return [
            f"parallel.tensor={config.parallel.tensor} spans nodes of {per_node} GPUs: its reductions go over the "
            "network; use more pipeline stages instead"
        ]
    return []


def static_problems(config: RunConfig, model_type: str) -> list[str]:
    """Everything that needs neither files nor packages."""
    found = arithmetic_problems(config)
    if config.engine == "megatron":
        return [*found, *checks.engine_problems(config), *checks.rollout_problems(config)]
    if config.engine == "nemo_rl":
        return [*found, *_nemo_rl_problems(config)]
    return [*found, *_aligner_problems(config, model_type)]


def _aligner_problems(config: RunConfig, model_type: str) -> list[str]:
    found = aligner_overrides.problems(config, model_type)
    if config.rollout.engine == "vllm":
        found.append("rollout.engine=vllm: only NeMo-RL has it; use megatron or trtllm, or engine=nemo_rl")
    settings = aligner_overrides.overrides(
        config, model_type, train=Path("train.jsonl"), evaluate=None, eval_prompts=0, eos=()
    )
    try:
        composed = compose_aligner(settings)
        aligner.method_config(composed.model)
        found += aligner.batch_problems(composed.trainer.grpo, composed.model, config.parallel.data or 1)
    except UserError as error:
        found += str(error).splitlines()
    except (HydraException, OmegaConfBaseException) as error:
        found.append(f"engine=nemo_aligner: {' '.join(str(error).split())}")
    return found


def compose_aligner(settings: list[str]) -> DictConfig:
    """The configuration that NeMo-Aligner's script will see, but for what the .nemo file brings."""
    for name, function in (
        ("multiply", lambda x, y: x * y),
        ("int_div", lambda x, y: x // y),
        ("subtract", lambda x, y: x - y),
    ):
        OmegaConf.register_new_resolver(name, function, replace=True)
    with initialize_config_dir(str(CONFIG_DIR / "nemo_aligner"), version_base="1.3"):
        composed = compose(aligner_overrides.CONFIG_NAME, overrides=settings)
    OmegaConf.resolve(composed)
    return composed


def _nemo_rl_problems(config: RunConfig) -> list[str]:
    settings = {
        "loss_fn": {"echorl": asdict(config.echorl)},
        "policy": {"megatron_cfg": {"enabled": True}},
        "grpo": {"use_dynamic_sampling": config.algo.dynamic_sampling},
    }
    found = nemo_rl.problems(settings) + nemo_rl_overrides.untranslatable(config)
    # the keys are those of the run's own configuration here
    return [
        problem.replace("loss_fn.echorl", "echorl").replace("grpo.use_dynamic", "algo.dynamic") for problem in found
    ]


def file_problems(config: RunConfig, total_parameters: int | None) -> tuple[list[str], checks.Inputs | None]:
    """What is not there or cannot be read or written, on this machine; and what the run reads."""
    problems, inputs = checks.read_inputs(config)
    problems += path_problems(config.model)
    if config.engine == "megatron":
        problems += checks.run_dir_problems(config)
    if config.engine == "nemo_aligner" and config.model.nemo_path and not Path(config.model.nemo_path).exists():
        problems.append(f"model.nemo_path={config.model.nemo_path}: no such file or folder")
    return problems + folder_problems(Path(config.trainer.run_dir), total_parameters), inputs


def folder_problems(run_dir: Path, total_parameters: int | None) -> list[str]:
    """Whether the run folder can be made and has room for a checkpoint."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return [f"trainer.run_dir={run_dir}: {folder} cannot be written to; name another folder"]
    free, wanted = shutil.disk_usage(folder).free, BYTES_OF_A_CHECKPOINT * (total_parameters or 0)
    if free < wanted:
        return [
            f"trainer.run_dir={run_dir}: {free / 1e9:.0f} GB are free in {folder}, a checkpoint has "
            f"{wanted / 1e9:.0f} GB; make room, or name another folder"
        ]
    return []


def memory_problems(config: RunConfig, estimates: list[Memory]) -> list[str]:
    """Whether the estimate exceeds a GPU's memory; only where `cluster` names GPUs."""
    limit = config.cluster.gpu_memory_gib
    if not config.cluster.gpus_per_node or config.parallel.device == "cpu":
        return []
    worst = max(estimates, key=lambda memory: memory.peak)
    if worst.peak <= limit:
        return []
    largest = max(worst.items, key=lambda item: item.value)
    remedies = {
        "activations": "trainer.recompute=full, parallel.sequence=true or a smaller trainer.micro_batch_size",
        "logits": "a smaller trainer.micro_batch_size or a larger parallel.tensor",
        "KV cache": "a smaller rollout.batch_size",
        "engine's weights": f"a larger rollout.{config.rollout.engine}.tensor_parallel",
    }
    remedy = remedies.get(largest.name, "a larger parallel.tensor or parallel.pipeline, or more GPUs")
    return [
        f"memory: a GPU of stage {worst.stage} needs about {worst.peak:.0f} GiB of cluster.gpu_memory_gib={limit:.0f}, "
        f"most of it {largest.name} ({largest.value:.0f} GiB); use {remedy}"
    ]
