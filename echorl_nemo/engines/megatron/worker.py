"""What each rank of a run does."""

from pathlib import Path

import torch.distributed as dist

from echorl_nemo.engines.megatron import checkpoint
from echorl_nemo.engines.megatron.checkpoint import Progress
from echorl_nemo.engines.megatron.checks import Inputs, newest_checkpoint
from echorl_nemo.engines.megatron.generate import MegatronRolloutEngine
from echorl_nemo.engines.megatron.model import PolicyModel, build_model
from echorl_nemo.engines.megatron.parallel import initialize
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.engines.megatron.policy import MegatronPolicy
from echorl_nemo.engines.megatron.trainer import Trainer
from echorl_nemo.report.recorder import Recorder
from echorl_nemo.rewards import VerifierPool
from echorl_nemo.rollout.engine import RolloutEngine
from echorl_nemo.schema import RunConfig


def run_rank(config: RunConfig, config_yaml: str, inputs: Inputs, platform: Platform) -> None:
    """Train from the start, or from the newest checkpoint of the run folder, to the last step."""
    trainer = build_trainer(config, inputs, platform)
    folder = Path(_of_main_rank(config.trainer.run_dir))
    checkpoints = folder / "checkpoints"
    latest = newest_checkpoint(folder) if config.trainer.resume else None
    first = 0
    if latest is not None:
        progress = checkpoint.load(latest, trainer.policy)
        trainer.rollout.update_weights(trainer.policy)  # an engine of its own has started from model.path
        first, trainer.position = progress.step, progress.position
    steps, recorder = config.trainer.steps, None
    if trainer.parallel.main:
        recorder = Recorder(folder, config_yaml, config.logger, steps=steps, first_step=first)
    if first == 0 and (evaluation := trainer.evaluate()) and recorder is not None:
        recorder.evaluation(-1, evaluation)

    for step in range(first, steps):
        metrics, batch, step_ids = trainer.step()
        last = step == steps - 1
        if last or _due(step, config.trainer.eval_every):
            metrics |= trainer.evaluate()
        if recorder is not None:
            recorder.step(step, metrics, batch, step_ids, inputs.tokenizer.pieces, trainer.failures)
        if last or _due(step, config.trainer.save_every):
            checkpoint.save(checkpoints, trainer.policy, Progress(step + 1, trainer.position))
    trainer.verifiers.close()
    trainer.rollout.close()
    if config.trainer.export:
        trainer.policy.model.export(folder / "export")
    if recorder is not None:
        recorder.finish()


def build_trainer(config: RunConfig, inputs: Inputs, platform: Platform) -> Trainer:
    """Form the process groups, load the model and tie the rooms together."""
    settings = config.trainer
    parallel = initialize(platform, config.parallel, seed=settings.seed, timeout_minutes=settings.timeout_minutes)
    model = build_model(config.model, config.parallel, parallel, platform, recompute=settings.recompute)
    policy = MegatronPolicy(
        model,
        algo=config.algo,
        echorl=config.echorl,
        trainer=settings,
        temperature=config.rollout.temperature,
        optimizer_steps=settings.steps * (settings.prompts_per_step // settings.minibatch_prompts),
    )
    return Trainer(
        config=config,
        policy=policy,
        rollout=_rollout_engine(config, inputs, model),
        verifiers=VerifierPool(
            [config.data.reward, *(extra.name for extra in config.data.extra_rewards)],
            workers=config.data.reward_workers,
            timeout_seconds=config.data.reward_timeout,
        ),
        train_data=inputs.train_data,
        eval_data=inputs.eval_data,
        boundary_ids=inputs.boundary_ids,
    )


def _rollout_engine(config: RunConfig, inputs: Inputs, model: PolicyModel) -> RolloutEngine:
    if config.rollout.engine == "megatron":
        return MegatronRolloutEngine(model, inputs.tokenizer, config.rollout)
    from echorl_nemo.rollout.trtllm.engine import TrtllmRolloutEngine

    held_out = inputs.eval_data.longest if inputs.eval_data is not None else 0
    return TrtllmRolloutEngine(
        config.model.path,
        inputs.tokenizer,
        config.rollout,
        model.parallel,
        vocab_size=model.config.vocab_size,
        longest_prompt=max(inputs.train_data.longest, held_out),
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _of_main_rank(value: str) -> str:
    """Ranks that resolved the configuration by themselves may differ in its time stamp."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
