"""Checks of a run in NeMo-Aligner: settings that it does not support, and batch sizes that do not divide."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from echorl_nemo.echo import EchoRLConfig
from echorl_nemo.engines.nemo_aligner.config import method_config
from echorl_nemo.engines.nemo_aligner.overrides import CONFIG_NAME, MODEL_TYPES, UNREAD, overrides
from echorl_nemo.errors import UserError
from echorl_nemo.grpo import AlgoConfig
from echorl_nemo.schema import RunConfig, changed
from echorl_nemo.shipped import CONFIG_DIR


def run_problems(config: RunConfig, model_type: str) -> list[str]:
    """Problems with a run's configuration in NeMo-Aligner. ``model_type``: the model's architecture."""
    found = translation_problems(config, model_type)
    settings = overrides(config, model_type, train=Path("train.jsonl"), evaluate=None, eval_prompts=0, eos=())
    try:
        composed = compose_host_config(settings)
        found += method_problems(*method_config(composed.model))
        found += batch_problems(composed.trainer.grpo, composed.model, config.parallel.data or 1)
    except UserError as error:
        found += str(error).splitlines()
    except (HydraException, OmegaConfBaseException) as error:
        found.append(f"engine=nemo_aligner: {' '.join(str(error).split())}")
    return found


def translation_problems(config: RunConfig, model_type: str) -> list[str]:
    """Problems with settings that NeMo-Aligner 0.7 does not support."""
    found = []
    if model_type not in MODEL_TYPES:
        found.append(
            f"engine=nemo_aligner: NeMo 2.1 converts {', '.join(MODEL_TYPES)}, not the {model_type} of "
            f"model.path={config.model.path}; use engine=nemo_rl"
        )
    if config.model.nemo_path is None:
        found.append(
            "model.nemo_path=null: NeMo-Aligner trains a .nemo file; convert model.path as docs/nemo_aligner.md says, "
            "and name it"
        )
    for key, value, usual in (
        ("parallel.context", config.parallel.context, 1),
        ("parallel.expert", config.parallel.expert, 1),
        ("parallel.first_stage_layers", config.parallel.first_stage_layers, None),
        ("parallel.last_stage_layers", config.parallel.last_stage_layers, None),
        ("trainer.pack_tokens", config.trainer.pack_tokens, 0),
        ("trainer.warmup_steps", config.trainer.warmup_steps, 0),
        ("trainer.eval_group_size", config.trainer.eval_group_size, 1),
        ("trainer.eval_temperature", config.trainer.eval_temperature, None),
        ("logger.mlflow_experiment", config.logger.mlflow_experiment, None),
    ):
        if value != usual:
            found.append(f"{key}={value}: NeMo-Aligner does not support it; use {_null(usual)}, or engine=nemo_rl")
    found += [
        f"{key}={value}: NeMo-Aligner does not read it; leave it out, or use engine=megatron"
        for key, value in changed(config, UNREAD)
    ]
    if config.rollout.engine == "vllm":
        found.append("rollout.engine=vllm: only NeMo-RL has it; use megatron or trtllm, or engine=nemo_rl")
    save, evaluate = config.trainer.save_every, config.trainer.eval_every
    if save and evaluate and save % evaluate:
        found.append(
            f"trainer.save_every={save}: NeMo-Aligner saves where it evaluates; use a multiple of "
            f"trainer.eval_every={evaluate}"
        )
    return found


def method_problems(algo: AlgoConfig, echorl: EchoRLConfig) -> list[str]:
    """Problems with settings of the method that NeMo-Aligner does not support: its rollouts come without log-probs, and
    a step generates from its prompts once."""
    problems = [
        f"model.grpo.algo.{name}={getattr(algo, name)}: NeMo-Aligner's rollouts come without log-probs; use null"
        for name in ("tis_cap", "icepop_low", "icepop_high")
        if getattr(algo, name) is not None
    ]
    problems += [
        f"model.grpo.algo.{name}={getattr(algo, name)}: NeMo-Aligner does not have it; use {off}, or engine=megatron"
        for name, values, off in (
            ("degenerate", ("avspo",), "zero"),
            ("anchor", ("mcpo",), "none"),
            ("demonstrations", ("luffy", "uft"), "none"),
        )
        if getattr(algo, name) in values
    ]
    if algo.dynamic_sampling:
        problems.append("model.grpo.algo.dynamic_sampling=true: NeMo-Aligner generates once in a step; use false")
    if echorl.entropy_source != "policy":
        problems.append(
            f"model.echorl.entropy_source={echorl.entropy_source}: NeMo-Aligner's TensorRT-LLM returns only tokens; "
            "use policy"
        )
    if echorl.fork_threshold == "running":
        problems.append("model.echorl.fork_threshold=running: NeMo-Aligner's checkpoints do not keep it; use step")
    return problems


def batch_problems(grpo: DictConfig, model_config: DictConfig, data_parallel: int) -> list[str]:
    """Problems with batch sizes that do not divide each other. ``grpo`` is the section `trainer.grpo`."""
    prompts, group = model_config.grpo.num_rollout_samples, grpo.num_rollouts_per_prompt
    rollouts, step = prompts * group, model_config.global_batch_size
    generated, scored = model_config.grpo.rollout_micro_batch_size, model_config.grpo.forward_micro_batch_size
    validated, validation = model_config.grpo.val_rollout_micro_batch_size, model_config.grpo.num_val_samples
    problems = []
    if group < 2:
        problems.append(
            f"trainer.grpo.num_rollouts_per_prompt={group}: a group needs rollouts to compare; use 2 or more"
        )
    trained = model_config.micro_batch_size
    if grpo.trt_llm.enable and grpo.trt_llm.reshard:  # pipeline stages generate as further replicas
        generated *= model_config.pipeline_model_parallel_size
        validated *= model_config.pipeline_model_parallel_size
    for what, count, key, divisor in (
        ("prompts of a step", prompts, "model.grpo.rollout_micro_batch_size x replicas", generated * data_parallel),
        (
            "prompts of a validation", validation, "model.grpo.val_rollout_micro_batch_size x replicas",
            validated * data_parallel,
        ),
        ("rollouts of a step", rollouts, "model.global_batch_size", step),
        ("rollouts of an optimizer step", step, "model.micro_batch_size x replicas", trained * data_parallel),
        ("rollouts of a replica", rollouts // data_parallel, "model.grpo.forward_micro_batch_size", scored),
    ):  # fmt: skip
        if count % divisor:
            problems.append(f"{key}={divisor}: it does not divide the {count} {what}; use a divisor of {count}")
    return problems


def compose_host_config(settings: list[str]) -> DictConfig:
    """The configuration that NeMo-Aligner's script composes, without what the .nemo file adds."""
    for name, function in (
        ("multiply", lambda x, y: x * y),
        ("int_div", lambda x, y: x // y),
        ("subtract", lambda x, y: x - y),
    ):
        OmegaConf.register_new_resolver(name, function, replace=True)
    with initialize_config_dir(str(CONFIG_DIR / "nemo_aligner"), version_base="1.3"):
        composed = compose(CONFIG_NAME, overrides=settings)
    OmegaConf.resolve(composed)
    return composed


def _null(value: Any) -> str:
    return "null" if value is None else str(value)
