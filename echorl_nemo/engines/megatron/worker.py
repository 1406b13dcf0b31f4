"""The training loop that each rank of a run executes: steps, evaluations, checkpoints, and when it ends."""

import logging
import shlex
import socket
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from echorl_nemo.data.inputs import RunInputs
from echorl_nemo.echo import segment_steps
from echorl_nemo.echo.rows import Rows
from echorl_nemo.engines.megatron.checkpoint import Checkpoints, Progress, load_weights
from echorl_nemo.engines.megatron.generate import MegatronRolloutEngine
from echorl_nemo.engines.megatron.model import build_model
from echorl_nemo.engines.megatron.model_check import check_model
from echorl_nemo.engines.megatron.parallel import Parallel, initialize
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.engines.megatron.policy import MegatronPolicy
from echorl_nemo.engines.megatron.trainer import StepResult, Trainer
from echorl_nemo.errors import SharedError, UserError
from echorl_nemo.ops.registry import Registry
from echorl_nemo.report.config import METRICS_FILE
from echorl_nemo.report.logger import ShownRollouts, read_lines
from echorl_nemo.report.recorder import Recorder
from echorl_nemo.report.skipped import save_skipped_batch
from echorl_nemo.resilience.disk import explain_full_disk
from echorl_nemo.resilience.lock import RunLock
from echorl_nemo.resilience.stop import EXIT_REQUEUE, StopRequest, StopSignals, job_deadline
from echorl_nemo.resilience.watchdog import Watchdog
from echorl_nemo.rewards import TIMED_OUT, VerifierPool
from echorl_nemo.rollout.batch import RolloutBatch, rows_of_groups
from echorl_nemo.rollout.engine import RolloutEngine
from echorl_nemo.rollout.restart import RestartingEngine
from echorl_nemo.schema import RunConfig

REQUEUE_FILE = "requeue"
"""File of the run folder that exists while the run has saved and has to be started again. It holds the reason."""

CARRIED = ("fork_threshold", "collapse_threshold", "earlier_reward")
"""Fields of the trainer that a step leaves for the next one; a checkpoint keeps them in fields of the same names."""


def run_rank(
    config: RunConfig,
    config_yaml: str,
    inputs: RunInputs,
    platform: Platform,
    signals: StopSignals,
    closers: ExitStack,
) -> int:
    """Train from the start, or from the newest checkpoint of the run folder, to the last step. Returns the exit code:
    0, or `EXIT_REQUEUE` for a run that has saved and has to be started again.

    ``signals`` must be listening already; ``closers`` receives a callback for everything that must be closed.
    """
    stop = StopRequest(config.resilience, job_deadline(config.resilience), signals)
    parallel = initialize_parallel(config, platform)
    # under torchrun every rank resolves the configuration, and the time stamps may differ
    folder = Path(parallel.run_on_main_rank(lambda: config.trainer.run_dir))
    parallel.run_on_main_rank(lambda: _lock(folder, closers))
    with explain_full_disk(folder):
        watchdog = Watchdog(folder, dist.get_rank(), limit_seconds=60 * config.resilience.step_limit_minutes)
        closers.callback(watchdog.close)
        watchdog.start_step(-1)
        watchdog.heartbeat("load")
        trainer = build_trainer(config, inputs, platform, parallel, watchdog)
        closers.callback(trainer.close)
        requeue = _TrainingLoop(config, config_yaml, inputs, folder, trainer, stop, closers).train()
    return EXIT_REQUEUE if requeue else 0


def _lock(folder: Path, closers: ExitStack) -> None:
    closers.callback(RunLock(folder).release)


class _TrainingLoop:
    """The loop around the training step: records, evaluates, saves, and decides when the run ends."""

    def __init__(
        self,
        config: RunConfig,
        config_yaml: str,
        inputs: RunInputs,
        folder: Path,
        trainer: Trainer,
        stop: StopRequest,
        closers: ExitStack,
    ) -> None:
        self.config, self.config_yaml, self.inputs, self.folder = config, config_yaml, inputs, folder
        self.trainer, self.policy, self.parallel = trainer, trainer.policy, trainer.parallel
        self.watchdog, self.stop = trainer.watchdog, stop
        self.checkpoints = Checkpoints(folder, config.checkpoint, self.parallel)
        self.progress = self._restore()
        self.saved = self.progress.step
        self.recorder: Recorder | None = None
        if self.parallel.is_main:
            (folder / REQUEUE_FILE).unlink(missing_ok=True)
            first_step = self.progress.step or -1  # the evaluation before the first step is step -1
            self.recorder = Recorder(
                folder, config_yaml, config.logger, steps=config.trainer.steps, first_step=first_step
            )
            closers.callback(self.recorder.stop)

    def train(self) -> bool:
        """Run the steps. Returns True if the run was asked to stop before its last step; it has saved then."""
        steps, reason = self.config.trainer.steps, self._reason_to_stop()
        if self.progress.step == 0 and not reason:
            self._evaluate_untrained()
        while self.progress.step < steps and not reason:
            self._step(last=self.progress.step == steps - 1)
            reason = self._reason_to_stop()
        self.watchdog.disarm()
        if self.progress.step > self.saved:
            self._save(None)
        self.checkpoints.finish()
        self.trainer.rollout.close()  # frees the memory of an engine that shares the GPUs, for the export
        stopped = self.progress.step < steps
        if not stopped and self.config.trainer.export:
            self.watchdog.heartbeat("export")
            self.policy.model.export(self.folder / "export")
        self.watchdog.heartbeat("stopped" if stopped else "done")
        self.watchdog.close()
        if self.recorder is not None:
            self.recorder.finish(summary=not stopped)
            if stopped:
                self._ask_to_be_requeued(reason)
        self.parallel.barrier()  # srun kills the other ranks when one ends with another exit code
        return stopped

    def _step(self, *, last: bool) -> None:
        step, trainer, settings = self.progress.step, self.trainer, self.config.trainer
        start = time.perf_counter()
        self.watchdog.start_step(step)
        done = trainer.step()
        if last or _due(step, settings.eval_every):
            done.metrics |= trainer.evaluate()
        self._record_progress(step, done)
        self.watchdog.heartbeat("record")
        shown = self._rollouts_to_show(done.batch) if self.config.logger.keeps_rollouts(step, last=last) else None
        if self.recorder is not None:
            self.recorder.step(step, done.metrics, shown, self.inputs.tokenizer.pieces, trainer.failures)
        self.checkpoints.poll()
        self.stop.record_duration("step", time.perf_counter() - start)
        if last or _due(step, settings.save_every):
            self._save(done.metrics.get("eval.accuracy"))
        self._give_up_after_many_skipped()

    def _rollouts_to_show(self, batch: RolloutBatch) -> ShownRollouts | None:
        """The rollouts of the step's first groups, on the main rank."""
        ids = Rows(len(batch), torch.device("cpu"), self.parallel.rows_group).gather(batch.group_ids)
        groups = list(dict.fromkeys(ids.tolist()))[: self.config.logger.groups]
        shown = self.parallel.gather_on_main(batch.select(rows_of_groups(batch, groups)))
        if shown is None:
            return None
        return ShownRollouts(shown, segment_steps(shown.tokens, shown.response_mask, self.inputs.boundary_ids))

    def _record_progress(self, step: int, done: StepResult) -> None:
        """Update the progress after a step. Of a step that was skipped, save the batch and print a warning."""
        progress = self.progress
        progress.step, progress.position = step + 1, self.trainer.position
        for name in CARRIED:
            setattr(progress, name, getattr(self.trainer, name))
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if done.skipped else 0
        progress.skipped_steps += bool(done.skipped)
        for failure in self.trainer.failures:
            if failure["failure"].startswith(TIMED_OUT):
                timeouts = progress.verifier_timeouts
                timeouts[failure["prompt"]] = timeouts.get(failure["prompt"], 0) + 1
                failure["timeouts"] = str(timeouts[failure["prompt"]])
        done.metrics["skipped"] = float(bool(done.skipped))
        whole = self.parallel.gather_on_main(done.batch) if done.skipped else None
        if whole is not None and self.recorder is not None:
            kept = save_skipped_batch(self.folder, step, whole, done.skipped)
            self.recorder.print(
                f"warning: step {step + 1} was not finite, {progress.skipped_in_a_row} in a row, and is skipped: "
                f"{done.skipped}; its batch is in {kept}"
            )

    def _give_up_after_many_skipped(self) -> None:
        if self.progress.skipped_in_a_row <= self.config.resilience.max_skipped_steps:
            return
        if self.progress.step > self.saved:
            self._save(None)
        self.checkpoints.finish()
        raise SharedError(
            f"{self.progress.skipped_in_a_row} steps in a row were not finite (resilience.max_skipped_steps="
            f"{self.config.resilience.max_skipped_steps}): no broken optimizer step was taken, and the policy is "
            f"saved; look at their batches in {self.folder / 'skipped'}, remove the cause or lower trainer.lr, and go "
            "on with trainer.resume=true"
        )

    def _reason_to_stop(self) -> str:
        """The reason to end the run now, the same on every rank; empty if it goes on."""
        reasons = self.parallel.all_gather_objects([self.stop.reason()])
        return next((reason for reason in reasons if reason), "")

    def _save(self, accuracy: float | None) -> None:
        start = time.perf_counter()
        self.watchdog.heartbeat("save")
        self.trainer.rollout.sleep()  # frees the memory of an engine that shares the GPUs, for the save
        self.checkpoints.save(self.policy, self.progress, self.config_yaml, accuracy=accuracy)
        self.saved = self.progress.step
        self.stop.record_duration("save", max(time.perf_counter() - start, self.checkpoints.longest_seconds))

    def _restore(self) -> Progress:
        """Load the newest checkpoint, if the run resumes, and return the progress. Raises UserError if the training
        data have changed since it was saved."""
        data = self._shared_fingerprint()
        start = time.perf_counter()
        progress = self.checkpoints.restore(self.policy) if self.config.trainer.resume else None
        if progress is None:
            self.parallel.run_on_main_rank(self._refuse_to_start_over)
            return Progress(data=data)
        self.stop.record_duration("save", time.perf_counter() - start)  # an estimate until the first save
        if progress.skipped_in_a_row > self.config.resilience.max_skipped_steps:
            progress.skipped_in_a_row = 0  # the person who resumes has seen the message
        if progress.data != data and not self.config.checkpoint.accept_changed_data:
            raise SharedError(
                f"data.train={self.config.data.train}: its prompts are not those that the run was trained on until "
                f"step {progress.step} ({progress.data}, now {data}); restore the file, or set "
                "checkpoint.accept_changed_data=true to go on with these"
            )
        progress.data = data
        self.trainer.position, self.trainer.steps_done = progress.position, progress.step
        for name in CARRIED:
            setattr(self.trainer, name, getattr(progress, name))
        self.trainer.rollout.update_weights(self.policy)  # an engine with its own weights has those of model.path
        return progress

    def _shared_fingerprint(self) -> str:
        """The fingerprint of the training data. Raises UserError if a rank, which reads the data itself, has others."""
        seen = self.parallel.all_gather_objects([(self.trainer.train_data.fingerprint, socket.gethostname())])
        for fingerprint, host in seen:
            if fingerprint != seen[0][0]:
                raise SharedError(
                    f"data.train={self.config.data.train}: {seen[0][1]} reads {seen[0][0]}, {host} {fingerprint}; give "
                    "all nodes the same file"
                )
        return seen[0][0]

    def _refuse_to_start_over(self) -> None:
        """Raises UserError if the run folder has no checkpoint and more metrics than a run without one can have."""
        settings = self.config.trainer
        if not settings.resume:
            return
        rows = read_lines(self.folder / METRICS_FILE)
        made = max((row["step"] + 1 for row in rows if isinstance(row.get("step"), int)), default=0)
        if settings.save_every and made > 2 * settings.save_every:
            raise UserError(
                f"trainer.run_dir={self.folder}: {made} steps were made and there is no checkpoint; check that its "
                f"storage is mounted; to start again, name another folder, or delete {METRICS_FILE}"
            )
        logging.getLogger(__name__).warning("%s holds no checkpoint: training from the start", self.folder)

    def _evaluate_untrained(self) -> None:
        self.watchdog.start_step(-1)
        if (evaluation := self.trainer.evaluate()) and self.recorder is not None:
            self.recorder.evaluation(-1, evaluation, self.trainer.failures)

    def _ask_to_be_requeued(self, reason: str) -> None:
        assert self.recorder is not None
        saved = "saved" if self.progress.step else "nothing to save"
        message = f"stopped after step {self.progress.step}: {reason}; {saved}, exit code {EXIT_REQUEUE}"
        self.recorder.print(message)
        where = shlex.quote(str(self.folder))
        self.recorder.print(
            f"to go on: echorl-nemo train --config-dir={where} --config-name=config trainer.resume=true"
        )
        (self.folder / REQUEUE_FILE).write_text(f"{message}\n", encoding="utf-8")


def initialize_parallel(config: RunConfig, platform: Platform) -> Parallel:
    """Create the process groups of a run."""
    settings = config.trainer
    return initialize(platform, config.parallel, seed=settings.seed, timeout_minutes=settings.timeout_minutes)


def build_trainer(
    config: RunConfig, inputs: RunInputs, platform: Platform, parallel: Parallel, watchdog: Watchdog
) -> Trainer:
    """Load the model, compare it with transformers', and create policy, rollout engine, verifiers and trainer."""
    settings = config.trainer
    model = build_model(config.model, config.parallel, parallel, platform, recompute=settings.recompute)
    policy = MegatronPolicy(
        model,
        algo=config.algo,
        echorl=config.echorl,
        trainer=settings,
        temperature=config.rollout.temperature,
        optimizer_steps=settings.steps * (settings.prompts_per_step // settings.minibatch_prompts),
        vocab_size=_vocabulary(config, inputs),
    )
    if config.model.verify == "auto":
        watchdog.heartbeat("check the model")
        check_model(policy, config.model, inputs.train_data.token_ids())
    return Trainer(
        config=config,
        policy=policy,
        rollout=ROLLOUT_ENGINES.load(config.rollout.engine)(config, inputs, policy),
        verifiers=VerifierPool(
            [config.data.reward, *(extra.name for extra in config.data.extra_rewards)],
            workers=config.data.reward_workers,
            timeout_seconds=config.data.reward_timeout,
        ),
        tokenizer=inputs.tokenizer,
        train_data=inputs.train_data,
        eval_data=inputs.eval_data,
        boundary_ids=inputs.boundary_ids,
        watchdog=watchdog,
    )


def _vocabulary(config: RunConfig, inputs: RunInputs) -> int | None:
    """Number of ids that have a probability: the tokenizer's if this engine generates. TensorRT-LLM samples from all
    ids of the model (None), and the policy's log-probs must be those of the distribution that was sampled from."""
    return len(inputs.tokenizer) if config.rollout.engine == "megatron" else None


def export_rank(config: RunConfig, checkpoint: Path, out: Path, platform: Platform) -> None:
    """Load a checkpoint's weights, at any layout, and write them as a Hugging Face folder."""
    model = build_model(config.model, config.parallel, initialize_parallel(config, platform), platform, train=False)
    load_weights(checkpoint, model)
    model.export(out)


ROLLOUT_ENGINES = Registry(
    "rollout.engine",
    {
        "megatron": "echorl_nemo.engines.megatron.worker:megatron_engine",
        "trtllm": "echorl_nemo.engines.megatron.worker:trtllm_engine",
    },
)
"""Functions of (configuration, inputs, policy) that create the rollout engine."""


def megatron_engine(config: RunConfig, inputs: RunInputs, policy: MegatronPolicy) -> RolloutEngine:
    """The engine `megatron`: the policy itself generates."""
    return MegatronRolloutEngine(policy.model, inputs.tokenizer, config.rollout)


def trtllm_engine(config: RunConfig, inputs: RunInputs, policy: MegatronPolicy) -> RolloutEngine:
    """The engine `trtllm`: TensorRT-LLM generates, and is restarted if it dies or hangs."""
    from echorl_nemo.rollout.trtllm.engine import TrtllmRolloutEngine

    held_out = inputs.eval_data.longest if inputs.eval_data is not None else 0
    start = partial(
        TrtllmRolloutEngine,
        config.model.path,
        inputs.tokenizer,
        config.rollout,
        policy.parallel,
        vocab_size=policy.model.config.vocab_size,
        longest_prompt=max(inputs.train_data.longest, held_out),
    )
    return RestartingEngine(start, policy, is_main=policy.parallel.is_main)


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
