"""Everything about a run that can be checked before a rank starts."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.echo import boundary_ids
from echorl_nemo.engines.megatron.config import EvaluateConfig, ModelConfig, ParallelConfig, RunConfig
from echorl_nemo.engines.megatron.launch import outer_world
from echorl_nemo.errors import UserError
from echorl_nemo.report.logger import METRICS_FILE
from echorl_nemo.rewards import find_verifier
from echorl_nemo.rollout.trtllm.api import refused_problems

CHECKPOINT_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts."""

    tokenizer: Tokenizer
    train_data: PromptData
    eval_data: PromptData | None
    boundary_ids: tuple[int, ...]


def world_size(config: RunConfig | EvaluateConfig) -> int:
    """Ranks of the run. Fills in `parallel.data`. Raises UserError if torchrun or srun started another number."""
    layout, outer = config.parallel, outer_world()
    replica = layout.tensor * layout.pipeline
    if layout.data is None:
        layout.data = 1 if outer is None else max(1, outer // replica)
    world = replica * layout.data
    if outer is not None and outer != world:
        raise UserError(
            f"{outer} ranks were started, but parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} "
            f"x parallel.data={layout.data} is {world}; start {world}, or change parallel.*"
        )
    return world


def check(config: RunConfig) -> Inputs:
    """Read tokenizer, model configuration and data, and raise UserError listing every problem of the run."""
    problems = arithmetic_problems(config)
    hf_config = _hf_config(config.model)
    problems += layout_problems(config.parallel, hf_config)
    tokenizer = Tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    train_data = eval_data = None
    boundaries: tuple[int, ...] = ()
    try:
        data = config.data
        train_data = PromptData(data.train, data, tokenizer, field="data.train", split=data.train_split)
        if data.eval is not None:
            eval_data = PromptData(data.eval, data, tokenizer, field="data.eval", split=data.eval_split)
    except UserError as error:
        problems.append(str(error))
    for name in (config.data.reward, *(extra.name for extra in config.data.extra_rewards)):
        try:
            find_verifier(name)
        except UserError as error:
            problems.append(f"data.reward or data.extra_rewards: {error}")
    try:
        boundaries = boundary_ids(tokenizer, config.echorl.boundary)
    except ValueError as error:
        problems.append(str(error))
    for name, prompts in (("data.train", train_data), ("data.eval", eval_data)):
        if prompts is not None:
            problems += length_problems(config.rollout.max_new_tokens, hf_config, prompts, name)
    if train_data is not None:
        problems += packing_problems(config, train_data)
    problems += rollout_problems(config)
    problems += run_dir_problems(config)
    if problems:
        raise UserError("\n".join(problems))
    assert train_data is not None
    return Inputs(tokenizer, train_data, eval_data, boundaries)


def check_evaluation(config: EvaluateConfig) -> tuple[Tokenizer, PromptData]:
    """Read tokenizer and problems, and raise UserError listing everything that is wrong with an evaluation."""
    hf_config = _hf_config(config.model)
    problems = layout_problems(config.parallel, hf_config)
    tokenizer = Tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if config.rollout.engine != "megatron":
        problems.append(f"rollout.engine={config.rollout.engine}: evaluations generate with megatron; use that")
    checkpoint = config.evaluation.checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        problems.append(f"evaluation.checkpoint={checkpoint}: no such folder")
    data = None
    try:
        find_verifier(config.data.reward)
        if config.data.eval is None:
            raise UserError("data.eval is null: name the problems, or choose a benchmark (benchmark=gsm8k)")
        data = PromptData(config.data.eval, config.data, tokenizer, field="data.eval", split=config.data.eval_split)
        problems += length_problems(config.rollout.max_new_tokens, hf_config, data, "data.eval")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    assert data is not None
    return tokenizer, data


def run_dir_problems(config: RunConfig) -> list[str]:
    """Whether the run folder's files would be lost."""
    run_dir = Path(config.trainer.run_dir)
    if not (run_dir / METRICS_FILE).exists():
        return []
    if not config.trainer.resume:
        return [
            f"trainer.run_dir={run_dir} holds a run already; set trainer.resume=true to go on with it, "
            "or name another folder"
        ]
    if newest_checkpoint(run_dir) is None:
        return [
            f"trainer.resume=true: {run_dir} holds a run that saved no checkpoint, see trainer.save_every; start "
            "again in another trainer.run_dir, or delete this one"
        ]
    return []


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The run's complete checkpoint of the most steps, None if there is none."""
    complete = [path for path in (run_dir / "checkpoints").glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return max(complete, key=lambda path: path.name, default=None)


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
            f"trainer.minibatch_prompts={trainer.minibatch_prompts}"
        )
    if trainer.minibatch_prompts % data:
        problems.append(
            f"trainer.minibatch_prompts={trainer.minibatch_prompts} groups are not divisible by "
            f"parallel.data={data}: a group is never split over replicas"
        )
    return problems


def layout_problems(layout: ParallelConfig, hf_config: PretrainedConfig) -> list[str]:
    """What of the model does not divide by the parallel sizes."""
    tensor, pipeline = layout.tensor, layout.pipeline
    kv_heads = getattr(hf_config, "num_key_value_heads", hf_config.num_attention_heads)
    # fewer key-value heads than ranks are copied to several ranks
    if kv_heads % tensor and tensor % kv_heads:
        uneven = [
            f"parallel.tensor={tensor}: the model's {kv_heads} key-value heads are neither divisible by it nor a "
            f"divisor of it; use a divisor or a multiple of {kv_heads}"
        ]
    else:
        uneven = []
    wanted = (
        ("attention heads", hf_config.num_attention_heads, "parallel.tensor", tensor),
        ("feed-forward width", hf_config.intermediate_size, "parallel.tensor", tensor),
        ("vocabulary entries", hf_config.vocab_size, "parallel.tensor", tensor),
        ("layers", hf_config.num_hidden_layers, "parallel.pipeline", pipeline),
    )
    return uneven + [
        f"{key}={size}: the model's {count} {what} are not divisible by it; use a divisor of {count}"
        for what, count, key, size in wanted
        if count % size
    ]


def length_problems(budget: int, hf_config: PretrainedConfig, data: PromptData, name: str) -> list[str]:
    """Whether prompt and response fit the model's positions."""
    limit = getattr(hf_config, "max_position_embeddings", None)
    longest = data.longest + budget
    if limit is not None and longest > limit:
        return [
            f"rollout.max_new_tokens={budget}: with the longest prompt of {name}, "
            f"{data.longest} tokens, that is {longest}, the model has {limit} positions"
        ]
    return []


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
        if importlib.util.find_spec("tensorrt_llm") is None:
            problems.append(
                "rollout.engine=trtllm: the package tensorrt_llm is not installed; run in a container that carries it, "
                "see docs/tensorrt_llm.md, or use rollout.engine=megatron"
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


def packing_problems(config: RunConfig, data: PromptData) -> list[str]:
    """Whether every rollout fits a packed row."""
    row, longest = config.trainer.pack_tokens, data.longest + config.rollout.max_new_tokens
    if 0 < row < longest:
        return [
            f"trainer.pack_tokens={row}: a rollout may have {longest} tokens, the longest prompt's {data.longest} and "
            f"rollout.max_new_tokens={config.rollout.max_new_tokens}; use {longest} or more, or 0 to pad"
        ]
    return []


def _hf_config(model: ModelConfig) -> PretrainedConfig:
    path = model.path
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={path}: no Hugging Face model can be read: {str(error).splitlines()[0]}"
        ) from error
