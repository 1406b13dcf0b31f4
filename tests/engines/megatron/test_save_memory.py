"""What a save takes of the host's memory is what docs/resilience.md says."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from echorl_nemo.engines.megatron.checkpoint import Checkpoints, Progress
from echorl_nemo.schema import RunConfig
from tests.conftest import REPOSITORY
from tests.engines.megatron.families import make_model
from tests.engines.megatron.helpers import LAYOUTS, trainer_of
from tests.engines.megatron.test_checkpoint import run_config

SLACK = 1.2
"""A process that writes, and the pages that it touches, differ from run to run."""


def documented_bytes() -> float:
    """Bytes of a parameter, as the page has them."""
    text = " ".join((REPOSITORY / "docs" / "resilience.md").read_text().split())
    found = re.search(r"a save takes at most (\d+) bytes of host memory for each parameter", text)
    assert found is not None
    return float(found[1])


def _memory() -> int:
    """Bytes of this process and of those that it started, shared pages counted once."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total


def _save(config: RunConfig) -> tuple[int, int]:
    """On a rank: its parameters, and by how many bytes a save raised the memory at its peak."""
    trainer = trainer_of(config)
    trainer.policy.initialize_optimizer_state()
    checkpoints = Checkpoints(Path(config.trainer.run_dir), config.checkpoint, trainer.parallel)
    before, peak, ended = _memory(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], _memory())

    watching = threading.Thread(target=watch)
    watching.start()
    checkpoints.save(trainer.policy, Progress(), "", accuracy=None)
    ended.set()
    watching.join()
    return sum(weight.numel() for weight in trainer.policy.model.module.parameters()), peak[0] - before


@pytest.mark.parametrize("layout", ["TP1", "TP2"])
def test_a_save_takes_what_is_documented(ranks: Callable[..., list[Any]], tmp_path: Path, layout: str) -> None:
    """Bytes of a parameter, from two sizes of a model: the processes that write have a size of their own."""
    seen = []
    for layers in (4, 12):
        model = make_model(
            "llama", tmp_path / f"model-{layers}", hidden_size=512, intermediate_size=2048, num_hidden_layers=layers
        )
        config = run_config(tmp_path / f"run-{layers}", *LAYOUTS[layout], f"model.path={model}", "model.verify=off")
        seen.append(ranks(2 if layout == "TP2" else 1, _save, config)[-1])
    (small, low), (large, high) = seen
    assert 0 < (high - low) / (large - small) <= documented_bytes() * SLACK
