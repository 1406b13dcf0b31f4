"""Checkpoints of the native engine, written and read by Megatron's dist_checkpointing.

A checkpoint holds weights, optimizer, learning-rate schedule, the random states of every rank, the progress of the run
and its configuration. Prompts and sampling depend only on the seed and on the number of prompts used so far, so that no
queue or cache of rollouts has to be saved. A checkpoint also loads at another layout; the random states then start from
the seed.
"""

import logging
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from echorl_nemo.engines.megatron.model import PolicyModel
from echorl_nemo.engines.megatron.parallel import Parallel
from echorl_nemo.engines.megatron.policy import MegatronPolicy
from echorl_nemo.errors import SharedError, UserError
from echorl_nemo.releases import checkpoint_writer, common_state, define_safe_load_from_bytes, load_options
from echorl_nemo.report.config import CONFIG_FILE
from echorl_nemo.resilience.checkpoints import MANIFEST, CheckpointFolder, Checksums, checksum_files, damaged_files
from echorl_nemo.resilience.config import CheckpointConfig
from echorl_nemo.resilience.ending import is_communication_error
from echorl_nemo.resilience.orphans import die_with_parent
from echorl_nemo.resilience.pickles import checkpoint_classes_only

T = TypeVar("T")

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Megatron's format of the optimizer's state that loads at another parallel layout."""
CHECKSUM_SUFFIX = ".sums"
"""Suffix of the temporary file with the checksums of what one rank wrote."""


@dataclass
class Progress:
    """The progress of a run, as a checkpoint keeps it."""

    step: int = 0
    """Completed training steps."""
    position: int = 0
    """Prompts used so far."""
    fork_threshold: float | None = None
    """Nats: the threshold of the next step's fork tokens, with `echorl.fork_threshold=running`."""
    collapse_threshold: float = 0.5
    """Share of groups with equal rewards above which AVSPO acts (`algo.degenerate=avspo`)."""
    earlier_reward: float | None = None
    """Mean reward of the latest step, by which that share is adapted."""
    skipped_steps: int = 0
    """Steps skipped because a loss, gradient or reward was not finite."""
    skipped_in_a_row: int = 0
    """Skipped steps at the end of the run so far, without a completed one between them."""
    verifier_timeouts: dict[str, int] = field(default_factory=dict)
    """Number of verifier time-outs by prompt."""
    data: str = ""
    """Fingerprint of the training data."""


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    folder: Path
    config_yaml: str
    accuracy: float | None
    begun: float
    """Start time, seconds of the monotonic clock."""


class Checkpoints:
    """Saves and loads the checkpoints of a run. Every rank must call each method."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, parallel: Parallel) -> None:
        self.folder, self.config, self.parallel = CheckpointFolder(run_dir / "checkpoints"), config, parallel
        self._writer = checkpoint_writer()
        self._calls = self._writer.calls_queue()
        self._pending: _Pending | None = None
        self.longest_seconds = 0.0
        """Longest time from the beginning of a save until its checkpoint was published, seconds."""

    def save(self, policy: MegatronPolicy, progress: Progress, config_yaml: str, *, accuracy: float | None) -> None:
        """Write a checkpoint, or begin to write it in the background if `checkpoint.asynchronous` is set.

        Raises UserError if it cannot be written; earlier checkpoints stay as they are.
        """
        self.finish()
        begun = time.monotonic()
        with self._explain_write_errors():
            folder = self._on_main(lambda: self.folder.begin(progress.step))
            _start_results_queue(self._writer.results_module)
            policy.initialize_optimizer_state()
            # replicas share the writing of what they all hold
            strategy = FullyParallelSaveStrategyWrapper(
                get_default_save_sharded_strategy(), self.parallel.replica_group
            )
            state = _state(policy, progress, low_memory=self.config.low_memory)
            request = dist_checkpointing.save(
                state, str(folder), strategy, async_sharded_save=True, **self._writer.save_options
            )
            if request.async_fn is not None:
                write = partial(_write_with_checksums, request.async_fn, folder)
                request = request._replace(async_fn=write)
            self._pending = _Pending(folder, config_yaml, accuracy, begun)
            if self.config.asynchronous:
                self._calls.schedule_async_request(request)
                return
            request.execute_sync()
        self._publish_pending()

    def poll(self) -> None:
        """Publish the checkpoint that is being written in the background, if it is complete."""
        if self._pending is not None:
            with self._explain_write_errors():
                done = self._calls.maybe_finalize_async_calls(blocking=False)
            if done:
                self._publish_pending()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, and publish it."""
        if self._pending is not None:
            with self._explain_write_errors():
                self._calls.maybe_finalize_async_calls(blocking=True)
            self._publish_pending()

    def restore(self, policy: MegatronPolicy) -> Progress | None:
        """Load the newest undamaged checkpoint into ``policy`` and return its progress; None if the run has none.

        Files of interrupted saves are removed. A checkpoint with a truncated or altered file is renamed with a warning,
        and the one before it is loaded. Raises UserError if there are checkpoints and all are damaged.
        """
        warn = logging.getLogger(__name__).warning
        for done in self.parallel.run_on_main_rank(self.folder.clean):
            if self.parallel.is_main:
                warn("checkpoints/%s", done)
        found = self.parallel.run_on_main_rank(self.folder.complete)
        damaged = self.parallel.run_on_main_rank(self.folder.without_manifest)
        for checkpoint in damaged if self.parallel.is_main else []:
            warn("%s is damaged: it has no %s", checkpoint, MANIFEST)
        for checkpoint in found:
            mine = damaged_files(checkpoint, part=dist.get_rank(), parts=dist.get_world_size())
            if wrong := self.parallel.all_gather_objects(mine):
                damaged.append(checkpoint)
                if self.parallel.is_main:
                    warn("%s is damaged: %s", checkpoint, "; ".join(wrong))
                continue
            for aside in self.parallel.run_on_main_rank(lambda: [self.folder.set_aside(path) for path in damaged]):
                if self.parallel.is_main:
                    warn("%s is taken; the damaged one is kept as %s", checkpoint, aside)
            return load(checkpoint, policy, low_memory=self.config.low_memory)
        if others := self.parallel.run_on_main_rank(
            lambda: sorted(path.name for path in self.folder.path.glob("step-*"))
        ):
            raise SharedError(
                f"{self.folder.path}: every checkpoint is damaged ({', '.join(others)}); restore one from a copy, or "
                "start again in another trainer.run_dir"
            )
        return None

    def _publish_pending(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        # through a collective, since another node's files may not be visible here yet
        parts = self.parallel.all_gather_objects([_read_own_checksums(pending.folder)])
        sums: Checksums = {name: value for part in parts for name, value in part.items()}
        self._on_main(lambda: self._publish(pending, sums))
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - pending.begun)

    def _publish(self, pending: "_Pending", sums: Checksums) -> None:
        """On the main rank: write the manifest with the checksums of every rank's files, and rename the folder."""
        written = FileSystemReader(pending.folder).read_metadata().storage_data.values()
        if unfinished := sorted({entry.relative_path for entry in written} - sums.keys()):
            raise UserError(
                f"{pending.folder}: the process that wrote {unfinished[0]} ended before it was done, see the messages "
                "above"
            )
        (pending.folder / CONFIG_FILE).write_text(pending.config_yaml, encoding="utf-8")
        own = {path.name for path in pending.folder.iterdir() if path.suffix not in (".distcp", CHECKSUM_SUFFIX)}
        self.folder.publish(pending.folder, sums | checksum_files(pending.folder, own), accuracy=pending.accuracy)
        self.folder.retain(self.config)

    def _on_main(self, work: Callable[[], T]) -> T:
        def explained() -> T:
            try:
                return work()
            except OSError as error:
                self.folder.clean()
                raise UserError(self._failure(str(error))) from error

        return self.parallel.run_on_main_rank(explained)

    @contextmanager
    def _explain_write_errors(self) -> Iterator[None]:
        """Turn what the libraries raise when a file cannot be written into an error that says what is safe."""
        try:
            yield
        except CheckpointException as error:  # on every rank, with the causes on the main one
            if any(is_communication_error(cause[0]) for cause in error.failures.values()):
                raise
            causes = "; ".join(str(cause[0]) for cause in error.failures.values())
            why = self.parallel.run_on_main_rank(lambda: causes)
            self.parallel.run_on_main_rank(self.folder.clean)
            raise SharedError(self._failure(why)) from error
        except (OSError, RuntimeError) as error:  # only on this rank; torch.save turns an OSError into a RuntimeError
            if is_communication_error(error):  # a peer has ended or hangs; the disk is not the cause
                raise
            if self.parallel.is_main:
                self.folder.clean()
            raise UserError(self._failure(str(error))) from error

    def _failure(self, why: str) -> str:
        newest = next(iter(self.folder.complete()), None)
        free = shutil.disk_usage(self.folder.path).free >> 20
        return (
            f"the checkpoint could not be written: {why}. The disk has {free} MiB free without it. "
            f"{'There is no earlier one' if newest is None else f'{newest.name} is untouched'}; make room in "
            f"{self.folder.path}, then go on with trainer.resume=true"
        )


def load(checkpoint: Path, policy: MegatronPolicy, *, low_memory: bool) -> Progress:
    """Load ``checkpoint`` into ``policy`` and return its progress. ``low_memory``: see `checkpoint.low_memory`."""
    with _reading(checkpoint):
        return _load(checkpoint, policy, low_memory=low_memory)


def _load(checkpoint: Path, policy: MegatronPolicy, *, low_memory: bool) -> Progress:
    common = common_state(checkpoint)
    same_layout = {"context": 1, **common["layout"]} == _layout()  # older checkpoints have no "context"
    state = _state(policy, Progress(), loading=True, low_memory=low_memory)
    if not same_layout:
        del state["random"]
    # replicas share the reading
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(checkpoint)), policy.parallel.replica_group
    )
    state = dist_checkpointing.load(state, str(checkpoint), strategy, **load_options(checkpoint))
    policy.model.module.load_state_dict(state["model"])
    policy.restore_optimizer(state["optimizer"], state["scheduler"])
    if same_layout:
        _set_random_states(state["random"])
    elif policy.parallel.is_main:
        logging.getLogger(__name__).warning(
            "%s was saved at %s, this is %s: random states start from the seed", checkpoint, common["layout"], _layout()
        )
    return Progress(**common["progress"])


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """`checkpoint_classes_only`, also where torch wraps the error of another rank that reads with this one."""
    define_safe_load_from_bytes()
    try:
        with checkpoint_classes_only(checkpoint):
            yield
    except CheckpointException as error:  # of the ranks that read together, another one refused
        if found := re.search(r"\S+: a pickle in it names [^\n]*", str(error)):
            raise SharedError(found[0]) from error
        raise


def load_weights(checkpoint: Path, model: PolicyModel) -> None:
    """Load only the weights of a checkpoint into ``model``.

    Raises UserError if a file of the checkpoint is damaged.
    """
    mine = damaged_files(checkpoint, part=dist.get_rank(), parts=dist.get_world_size())
    if wrong := model.parallel.all_gather_objects(mine):
        raise SharedError(f"{checkpoint} is damaged ({'; '.join(wrong)}); use the one before it")
    with _reading(checkpoint):
        wanted = {"model": model.module.sharded_state_dict()}
        state = dist_checkpointing.load(wanted, str(checkpoint), **load_options(checkpoint))
    model.module.load_state_dict(state["model"])


def _state(policy: MegatronPolicy, progress: Progress, *, low_memory: bool, loading: bool = False) -> dict[str, Any]:
    metadata = {**OPTIMIZER_FORMAT, "distrib_optim_fully_reshardable_mem_efficient": low_memory}
    model = policy.model.module.sharded_state_dict()
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "scheduler": policy.scheduler.state_dict(),
        "random": ShardedObject("random", None if loading else _random_states(), (world,), (rank,)),
        "progress": asdict(progress),
        "layout": _layout(),
    }


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _random_states() -> dict[str, Any]:
    """The states of this rank's random number generators, Megatron's tensor-parallel tracker included."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _read_own_checksums(folder: Path) -> Checksums:
    """Read and remove the checksums of this rank's files; empty if it had nothing to write."""
    path = folder / f"{dist.get_rank()}{CHECKSUM_SUFFIX}"
    if not path.is_file():
        return {}
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    path.unlink()
    return {name: (int(size), int(crc)) for name, size, crc in lines}


def _write_with_checksums(write: Callable[..., None], folder: Path, rank: int, *rest: Any) -> None:
    """Write a rank's files, then their checksums. Runs in the process that Megatron starts for writing."""
    write(rank, *rest)
    sums = checksum_files(folder, sorted(path.name for path in folder.glob(f"__{rank}_*")))
    lines = "".join(f"{name} {size} {crc}\n" for name, (size, crc) in sums.items())
    (folder / f"{rank}{CHECKSUM_SUFFIX}").write_text(lines, encoding="utf-8")


def _start_results_queue(module: Any) -> None:
    """Start the process of the queue that the writer in ``module`` reports through, so that it ends with this rank: the
    one that the writer starts by itself would outlive a rank that is killed."""
    if module._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(die_with_parent)
        module._results_queue = manager.Queue()
