"""Checkpoints of the native engine, through Megatron's dist_checkpointing.

A checkpoint holds weights, optimizer, learning-rate schedule, the random states of every rank, how far the run had
come, and its configuration. Prompts and sampling depend on the seed and on how many prompts were asked, so that no
queue or cache of rollouts has to be saved. It loads at another layout; then the random states start from the seed.
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
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
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
from echorl_nemo.report.config import CONFIG_FILE
from echorl_nemo.resilience.checkpoints import MANIFEST, CheckpointFolder, Sums, damages, sum_files
from echorl_nemo.resilience.config import CheckpointConfig
from echorl_nemo.resilience.ending import is_communication_error
from echorl_nemo.resilience.orphans import die_with_parent
from echorl_nemo.resilience.pickles import checkpoint_classes_only

T = TypeVar("T")

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Loads at another parallel layout."""
SUMS_SUFFIX = ".sums"
"""Of the file in which a rank leaves the checksums of what it wrote, until the main rank has them."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Training steps made."""
    position: int = 0
    """Prompts asked."""
    skipped_steps: int = 0
    """Steps that were skipped because something was not finite."""
    skipped_in_a_row: int = 0
    """Of those, the latest without a sound step between them."""
    verifier_timeouts: dict[str, int] = field(default_factory=dict)
    """By prompt, how often its verifier ran out of time."""
    data: str = ""
    """Fingerprint of the training data."""


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    folder: Path
    config_yaml: str
    accuracy: float | None
    begun: float
    """Clock reading, seconds."""


class Checkpoints:
    """Saves and loads on every rank; each method must be called by all of them."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, parallel: Parallel) -> None:
        self.folder, self.config, self.parallel = CheckpointFolder(run_dir / "checkpoints"), config, parallel
        self._calls = AsyncCallsQueue()
        self._pending: _Pending | None = None
        self.longest_seconds = 0.0
        """Of a save, from its beginning until its checkpoint was there."""

    def save(self, policy: MegatronPolicy, progress: Progress, config_yaml: str, *, accuracy: float | None) -> None:
        """Write a checkpoint, or begin to; see `checkpoint.asynchronous`.

        Raises UserError where it cannot be written; those before it are untouched.
        """
        self.finish()
        begun = time.monotonic()
        with self._explained():
            folder = self._on_main(lambda: self.folder.begin(progress.step))
            _start_mortal_results_queue()
            policy.fill_optimizer_state()
            # replicas share the writing of what they all hold
            strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), self.parallel.data_group)
            state = _state(policy, progress, low_memory=self.config.low_memory)
            request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True)
            if request.async_fn is not None:
                write = partial(_write_and_sum, request.async_fn, folder)
                request = request._replace(async_fn=write)
            self._pending = _Pending(folder, config_yaml, accuracy, begun)
            if self.config.asynchronous:
                self._calls.schedule_async_request(request)
                return
            request.execute_sync()
        self._settle()

    def poll(self) -> None:
        """Publish the checkpoint that is being written, if it is on the disk by now."""
        if self._pending is not None:
            with self._explained():
                done = self._calls.maybe_finalize_async_calls(blocking=False)
            if done:
                self._settle()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is published."""
        if self._pending is not None:
            with self._explained():
                self._calls.maybe_finalize_async_calls(blocking=True)
            self._settle()

    def restore(self, policy: MegatronPolicy) -> Progress | None:
        """Load the newest checkpoint that is sound, None where the run has none; remove what interrupted saves left.

        One with a truncated or altered file is set aside, said so, and the one before it is taken. Raises UserError if
        there are checkpoints and none is sound.
        """
        say = logging.getLogger(__name__).warning
        for done in self.parallel.of_main(self.folder.clean):
            if self.parallel.main:
                say("checkpoints/%s", done)
        found = self.parallel.of_main(self.folder.complete)
        damaged = self.parallel.of_main(self.folder.without_manifest)
        for checkpoint in damaged if self.parallel.main else []:
            say("%s is damaged: it has no %s", checkpoint, MANIFEST)
        for checkpoint in found:
            mine = damages(checkpoint, part=dist.get_rank(), parts=dist.get_world_size())
            if wrong := self.parallel.share_objects(mine):
                damaged.append(checkpoint)
                if self.parallel.main:
                    say("%s is damaged: %s", checkpoint, "; ".join(wrong))
                continue
            for aside in self.parallel.of_main(lambda: [self.folder.set_aside(path) for path in damaged]):
                if self.parallel.main:
                    say("%s is taken; the damaged one is kept as %s", checkpoint, aside)
            return load(checkpoint, policy, low_memory=self.config.low_memory)
        if others := self.parallel.of_main(lambda: sorted(path.name for path in self.folder.path.glob("step-*"))):
            raise SharedError(
                f"{self.folder.path}: no checkpoint is sound of {', '.join(others)}; restore one from a copy, or start "
                "again in another trainer.run_dir"
            )
        return None

    def _settle(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        # by message, since another node's files may not show in a listing of this one yet
        parts = self.parallel.share_objects([_take_sums(pending.folder)])
        sums: Sums = {name: value for part in parts for name, value in part.items()}
        self._on_main(lambda: self._publish(pending, sums))
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - pending.begun)

    def _publish(self, pending: "_Pending", sums: Sums) -> None:
        """On the main rank: the checksums of what every rank wrote, and of what this one did, go into the manifest."""
        written = FileSystemReader(pending.folder).read_metadata().storage_data.values()
        if unsummed := sorted({entry.relative_path for entry in written} - sums.keys()):
            raise UserError(
                f"{pending.folder}: the process that wrote {unsummed[0]} ended before it was done, see the messages "
                "above"
            )
        (pending.folder / CONFIG_FILE).write_text(pending.config_yaml, encoding="utf-8")
        own = {path.name for path in pending.folder.iterdir() if path.suffix not in (".distcp", SUMS_SUFFIX)}
        self.folder.publish(pending.folder, sums | sum_files(pending.folder, own), accuracy=pending.accuracy)
        self.folder.retain(self.config)

    def _on_main(self, work: Callable[[], T]) -> T:
        def told() -> T:
            try:
                return work()
            except OSError as error:
                self.folder.clean()
                raise UserError(self._failure(str(error))) from error

        return self.parallel.of_main(told)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the libraries raise when a file cannot be written, as an error that says what is safe."""
        try:
            yield
        except CheckpointException as error:  # on every rank, with the causes on the main one
            if any(is_communication_error(cause[0]) for cause in error.failures.values()):
                raise
            causes = "; ".join(str(cause[0]) for cause in error.failures.values())
            why = self.parallel.of_main(lambda: causes)
            self.parallel.of_main(self.folder.clean)
            raise SharedError(self._failure(why)) from error
        except (OSError, RuntimeError) as error:  # on this rank alone; torch.save hides the first in the second
            if is_communication_error(error):  # a peer is gone or hangs: the disk is not to blame
                raise
            if self.parallel.main:
                self.folder.clean()
            raise UserError(self._failure(str(error))) from error

    def _failure(self, why: str) -> str:
        newest = next(iter(self.folder.complete()), None)
        free = shutil.disk_usage(self.folder.path).free >> 20
        return (
            f"the checkpoint could not be written: {why}. The disk has {free} MiB free without it. "
            f"{'No earlier one is there' if newest is None else f'{newest.name} is untouched'}; make room in "
            f"{self.folder.path}, then go on with trainer.resume=true"
        )


def load(checkpoint: Path, policy: MegatronPolicy, *, low_memory: bool) -> Progress:
    """Restore ``policy``; returns how far it had come. ``low_memory``: see `checkpoint.low_memory`."""
    with _refusing_other_pickles(checkpoint):
        return _load(checkpoint, policy, low_memory=low_memory)


def _load(checkpoint: Path, policy: MegatronPolicy, *, low_memory: bool) -> Progress:
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    same_layout = common["layout"] == _layout()
    state = _state(policy, Progress(), loading=True, low_memory=low_memory)
    if not same_layout:
        del state["random"]
    # replicas share the reading
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(checkpoint)), policy.parallel.data_group
    )
    state = dist_checkpointing.load(state, str(checkpoint), strategy)
    policy.model.module.load_state_dict(state["model"])
    policy.restore_optimizer(state["optimizer"], state["scheduler"])
    if same_layout:
        _set_random_states(state["random"])
    elif policy.parallel.main:
        logging.getLogger(__name__).warning(
            "%s was saved at %s, this is %s: random states start from the seed", checkpoint, common["layout"], _layout()
        )
    return Progress(**common["progress"])


@contextmanager
def _refusing_other_pickles(checkpoint: Path) -> Iterator[None]:
    """See `checkpoint_classes_only`; torch wraps what is raised while ranks read together."""
    try:
        with checkpoint_classes_only(checkpoint):
            yield
    except CheckpointException as error:  # of the ranks that read together, another one refused
        if found := re.search(r"\S+: a pickle in it names [^\n]*", str(error)):
            raise SharedError(found[0]) from error
        raise


def load_weights(checkpoint: Path, model: PolicyModel) -> None:
    """Load the weights alone into ``model``, without an optimizer.

    Raises UserError if a file of the checkpoint is damaged.
    """
    mine = damages(checkpoint, part=dist.get_rank(), parts=dist.get_world_size())
    if wrong := model.parallel.share_objects(mine):
        raise SharedError(f"{checkpoint} is damaged ({'; '.join(wrong)}); take the one before it")
    with _refusing_other_pickles(checkpoint):
        state = dist_checkpointing.load({"model": model.module.sharded_state_dict()}, str(checkpoint))
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
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _random_states() -> dict[str, Any]:
    """Of this rank, the tensor-parallel tracker's among them."""
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


def _take_sums(folder: Path) -> Sums:
    """The checksums of what this rank wrote; it may have had nothing to write."""
    path = folder / f"{dist.get_rank()}{SUMS_SUFFIX}"
    if not path.is_file():
        return {}
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    path.unlink()
    return {name: (int(size), int(crc)) for name, size, crc in lines}


def _write_and_sum(write: Callable[..., None], folder: Path, rank: int, *rest: Any) -> None:
    """In the process that writes: the rank's files, then the checksums of what arrived."""
    write(rank, *rest)
    sums = sum_files(folder, sorted(path.name for path in folder.glob(f"__{rank}_*")))
    lines = "".join(f"{name} {size} {crc}\n" for name, (size, crc) in sums.items())
    (folder / f"{rank}{SUMS_SUFFIX}").write_text(lines, encoding="utf-8")


def _start_mortal_results_queue() -> None:
    """Megatron's writer reports through a queue in a process of its own, which would outlive a rank that is killed: it
    takes one that does not."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(die_with_parent)
        filesystem_async._results_queue = manager.Queue()
