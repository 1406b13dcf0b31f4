"""What each rank of a run does."""

import logging
import shlex
import socket
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch.distributed as dist

from echorl_nemo.engines.megatron.checkpoint import Checkpoints, Progress, load_weights
from echorl_nemo.engines.megatron.checks import Inputs
from echorl_nemo.engines.megatron.generate import MegatronRolloutEngine
from echorl_nemo.engines.megatron.model import build_model
from echorl_nemo.engines.megatron.model_check import check_model
from echorl_nemo.engines.megatron.parallel import Parallel, initialize
from echorl_nemo.engines.megatron.platform import Platform
from echorl_nemo.engines.megatron.policy import MegatronPolicy
from echorl_nemo.engines.megatron.trainer import Step, Trainer
from echorl_nemo.errors import SharedError, UserError
from echorl_nemo.report.config import METRICS_FILE
from echorl_nemo.report.logger import read_lines
from echorl_nemo.report.recorder import Recorder
from echorl_nemo.resilience.disk import full_disk_explained
from echorl_nemo.resilience.lock import RunLock
from echorl_nemo.resilience.skipped import keep_batch
from echorl_nemo.resilience.stop import EXIT_REQUEUE, StopRequest, StopSignals, job_deadline
from echorl_nemo.resilience.watch import Watch
from echorl_nemo.rewards import TIMED_OUT, VerifierPool
from echorl_nemo.rollout.engine import RolloutEngine
from echorl_nemo.rollout.restart import RestartingEngine
from echorl_nemo.schema import RunConfig

REQUEUE_FILE = "requeue"
"""Of the run folder: there while the run has saved and wants to be started again; says why."""


def run_rank(
    config: RunConfig,
    config_yaml: str,
    inputs: Inputs,
    platform: Platform,
    signals: StopSignals,
    closers: ExitStack,
) -> int:
    """Train from the start, or from the newest checkpoint of the run folder, to the last step. Returns the exit code:
    0, or that of a run which saved and wants to be started again.

    ``signals`` listen already; ``closers`` get the callbacks that close what is started.
    """
    stop = StopRequest(config.resilience, job_deadline(config.resilience), signals)
    parallel = form_groups(config, platform)
    # ranks that resolved the configuration by themselves may differ in its time stamp
    folder = Path(parallel.of_main(lambda: config.trainer.run_dir))
    parallel.of_main(lambda: _lock(folder, closers))
    with full_disk_explained(folder):
        watch = Watch(folder, dist.get_rank(), limit_seconds=60 * config.resilience.step_limit_minutes)
        closers.callback(watch.close)
        watch.step(-1)
        watch.beat("load")
        trainer = build_trainer(config, inputs, platform, parallel, watch)
        closers.callback(trainer.close)
        requeue = _Run(config, config_yaml, inputs, folder, trainer, stop, closers).train()
    return EXIT_REQUEUE if requeue else 0


def _lock(folder: Path, closers: ExitStack) -> None:
    closers.callback(RunLock(folder).release)


class _Run:
    """The loop around the training step: what is recorded, saved, and when it ends."""

    def __init__(
        self,
        config: RunConfig,
        config_yaml: str,
        inputs: Inputs,
        folder: Path,
        trainer: Trainer,
        stop: StopRequest,
        closers: ExitStack,
    ) -> None:
        self.config, self.config_yaml, self.inputs, self.folder = config, config_yaml, inputs, folder
        self.trainer, self.policy, self.parallel = trainer, trainer.policy, trainer.parallel
        self.watch, self.stop = trainer.watch, stop
        self.checkpoints = Checkpoints(folder, config.checkpoint, self.parallel)
        self.progress = self._restore()
        self.saved = self.progress.step
        self.recorder: Recorder | None = None
        if self.parallel.main:
            (folder / REQUEUE_FILE).unlink(missing_ok=True)
            first_step = self.progress.step or -1  # the evaluation before the first step is step -1
            self.recorder = Recorder(
                folder, config_yaml, config.logger, steps=config.trainer.steps, first_step=first_step
            )
            closers.callback(self.recorder.stop)

    def train(self) -> bool:
        """True if the run was asked to stop before its last step, and has saved."""
        steps, reason = self.config.trainer.steps, self._reason_to_stop()
        if self.progress.step == 0 and not reason:
            self._evaluate_untrained()
        while self.progress.step < steps and not reason:
            self._step(last=self.progress.step == steps - 1)
            reason = self._reason_to_stop()
        self.watch.rest()
        if self.progress.step > self.saved:
            self._save(None)
        self.checkpoints.finish()
        self.trainer.rollout.close()  # an engine that shares the GPUs: an export takes memory
        stopped = self.progress.step < steps
        if not stopped and self.config.trainer.export:
            self.watch.beat("export")
            self.policy.model.export(self.folder / "export")
        self.watch.beat("stopped" if stopped else "done")
        self.watch.close()
        if self.recorder is not None:
            self.recorder.finish(summary=not stopped)
            if stopped:
                self._ask_to_be_requeued(reason)
        self.parallel.barrier()  # a rank that ends with a code of its own has srun kill the others
        return stopped

    def _step(self, *, last: bool) -> None:
        step, trainer, settings = self.progress.step, self.trainer, self.config.trainer
        start = time.perf_counter()
        self.watch.step(step)
        done = trainer.step()
        if last or _due(step, settings.eval_every):
            done.metrics |= trainer.evaluate()
        self._count(step, done)
        if self.recorder is not None:
            self.watch.beat("record")
            self.recorder.step(
                step, done.metrics, done.batch, done.step_ids, self.inputs.tokenizer.pieces, trainer.failures
            )
        self.checkpoints.poll()
        self.stop.took("step", time.perf_counter() - start)
        if last or _due(step, settings.save_every):
            self._save(done.metrics.get("eval.accuracy"))
        self._give_up_after_many_skipped()

    def _count(self, step: int, done: Step) -> None:
        """Move the progress on by a step, and tell what was skipped."""
        progress = self.progress
        progress.step, progress.position = step + 1, self.trainer.position
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if done.skipped else 0
        progress.skipped_steps += bool(done.skipped)
        for failure in self.trainer.failures:
            if failure["failure"].startswith(TIMED_OUT):
                timeouts = progress.verifier_timeouts
                timeouts[failure["prompt"]] = timeouts.get(failure["prompt"], 0) + 1
                failure["timeouts"] = str(timeouts[failure["prompt"]])
        done.metrics["skipped"] = float(bool(done.skipped))
        if done.skipped and self.recorder is not None:
            kept = keep_batch(self.folder, step, done.batch, done.skipped)
            self.recorder.say(
                f"warning: step {step + 1} was not finite, {progress.skipped_in_a_row} in a row, and not learnt from: "
                f"{done.skipped}; its batch is {kept}"
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
            f"saved; look at their batches in {self.folder / 'skipped'}, mend the cause or lower trainer.lr, and go on "
            "with trainer.resume=true"
        )

    def _reason_to_stop(self) -> str:
        """Why the run ends here, the same on every rank; empty if it goes on."""
        reasons = self.parallel.share_objects([self.stop.reason()])
        return next((reason for reason in reasons if reason), "")

    def _save(self, accuracy: float | None) -> None:
        start = time.perf_counter()
        self.watch.beat("save")
        self.trainer.rollout.sleep()  # an engine that shares the GPUs: a save takes memory
        self.checkpoints.save(self.policy, self.progress, self.config_yaml, accuracy=accuracy)
        self.saved = self.progress.step
        self.stop.took("save", max(time.perf_counter() - start, self.checkpoints.longest_seconds))

    def _restore(self) -> Progress:
        """Where the run goes on. Raises UserError if the training data are others than when it was saved."""
        data = self._shared_fingerprint()
        start = time.perf_counter()
        progress = self.checkpoints.restore(self.policy) if self.config.trainer.resume else None
        if progress is None:
            self.parallel.of_main(self._refuse_to_start_over)
            return Progress(data=data)
        self.stop.took("save", time.perf_counter() - start)  # until one is made
        if progress.skipped_in_a_row > self.config.resilience.max_skipped_steps:
            progress.skipped_in_a_row = 0  # whoever goes on has seen the message
        if progress.data != data and not self.config.checkpoint.accept_changed_data:
            raise SharedError(
                f"data.train={self.config.data.train}: its prompts are not those that the run was trained on until "
                f"step {progress.step} ({progress.data}, now {data}); restore the file, or set "
                "checkpoint.accept_changed_data=true to go on with these"
            )
        progress.data = data
        self.trainer.position = progress.position
        self.trainer.rollout.update_weights(self.policy)  # an engine of its own has started from model.path
        return progress

    def _shared_fingerprint(self) -> str:
        """Of the training data, which every rank has read by itself. Raises UserError that names a host with others."""
        seen = self.parallel.share_objects([(self.trainer.train_data.fingerprint, socket.gethostname())])
        for fingerprint, host in seen:
            if fingerprint != seen[0][0]:
                raise SharedError(
                    f"data.train={self.config.data.train}: {seen[0][1]} reads {seen[0][0]}, {host} {fingerprint}; give "
                    "all nodes the same file"
                )
        return seen[0][0]

    def _refuse_to_start_over(self) -> None:
        """Raises UserError if the folder's metrics go past the step at which a checkpoint must have been there."""
        settings = self.config.trainer
        if not settings.resume:
            return
        rows = read_lines(self.folder / METRICS_FILE)
        made = max((row["step"] + 1 for row in rows if isinstance(row.get("step"), int)), default=0)
        if settings.save_every and made > 2 * settings.save_every:
            raise UserError(
                f"trainer.run_dir={self.folder}: {made} steps were made and no checkpoint is there; is its storage "
                f"mounted? To start again, name another folder, or delete {METRICS_FILE}"
            )
        logging.getLogger(__name__).warning("%s holds no checkpoint: training from the start", self.folder)

    def _evaluate_untrained(self) -> None:
        self.watch.step(-1)
        if (evaluation := self.trainer.evaluate()) and self.recorder is not None:
            self.recorder.evaluation(-1, evaluation, self.trainer.failures)

    def _ask_to_be_requeued(self, reason: str) -> None:
        assert self.recorder is not None
        saved = "saved" if self.progress.step else "nothing to save"
        told = f"stopped after step {self.progress.step}: {reason}; {saved}, exit code {EXIT_REQUEUE}"
        self.recorder.say(told)
        where = shlex.quote(str(self.folder))
        self.recorder.say(f"to go on: echorl-nemo train --config-dir={where} --config-name=config trainer.resume=true")
        (self.folder / REQUEUE_FILE).write_text(f"{told}\n", encoding="utf-8")


def form_groups(config: RunConfig, platform: Platform) -> Parallel:
    """The process groups of a run."""
    settings = config.trainer
    return initialize(platform, config.parallel, seed=settings.seed, timeout_minutes=settings.timeout_minutes)


def build_trainer(config: RunConfig, inputs: Inputs, platform: Platform, parallel: Parallel, watch: Watch) -> Trainer:
    """Load the model, check it, and make what generates, verifies and trains."""
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
        watch.beat("check the model")
        check_model(policy, config.model, inputs.train_data.token_ids())
    return Trainer(
        config=config,
        policy=policy,
        rollout=_rollout_engine(config, inputs, policy),
        verifiers=VerifierPool(
            [config.data.reward, *(extra.name for extra in config.data.extra_rewards)],
            workers=config.data.reward_workers,
            timeout_seconds=config.data.reward_timeout,
        ),
        train_data=inputs.train_data,
        eval_data=inputs.eval_data,
        boundary_ids=inputs.boundary_ids,
        watch=watch,
    )


def _vocabulary(config: RunConfig, inputs: Inputs) -> int | None:
    """Entries that count in a distribution: the tokenizer's, where this engine samples. TensorRT-LLM samples from all
    that the model has, and the policy's log-probs have to be those of what it sampled from."""
    return len(inputs.tokenizer) if config.rollout.engine == "megatron" else None


def export_rank(config: RunConfig, checkpoint: Path, out: Path, platform: Platform) -> None:
    """Load a checkpoint's weights, at whatever layout, and write them as a Hugging Face folder."""
    model = build_model(config.model, config.parallel, form_groups(config, platform), platform, train=False)
    load_weights(checkpoint, model)
    model.export(out)


def _rollout_engine(config: RunConfig, inputs: Inputs, policy: MegatronPolicy) -> RolloutEngine:
    model = policy.model
    if config.rollout.engine == "megatron":
        return MegatronRolloutEngine(model, inputs.tokenizer, config.rollout)
    from echorl_nemo.rollout.trtllm.engine import TrtllmRolloutEngine

    held_out = inputs.eval_data.longest if inputs.eval_data is not None else 0
    start = partial(
        TrtllmRolloutEngine,
        config.model.path,
        inputs.tokenizer,
        config.rollout,
        model.parallel,
        vocab_size=model.config.vocab_size,
        longest_prompt=max(inputs.train_data.longest, held_out),
    )
    return RestartingEngine(start, policy, tells=model.parallel.main)


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
