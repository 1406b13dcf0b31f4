"""A resumed run goes on as if it had not stopped."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.chaos import assert_same_run, metrics_of
from echorl_nemo.config import to_yaml
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.errors import SharedError, UserError
from echorl_nemo.releases import common_state
from echorl_nemo.report.config import METRICS_FILE
from echorl_nemo.resilience.checkpoints import CheckpointFolder
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, run_to_end, tiny_config

Ranks = Callable[..., list[Any]]
RUN = [
    "trainer.steps=6", "data.eval=null", "logger.rollouts_every=1", "rollout.max_new_tokens=24",
    "trainer.minibatch_prompts=2", "logger.tensorboard=false",
]  # fmt: skip
RESUME = "trainer.resume=true"


def run_config(folder: Path, *overrides: str) -> RunConfig:
    """A run of six steps on the tiny task; the schedule is that of six steps however many are made."""
    return tiny_config(f"trainer.run_dir={folder}", *RUN, *overrides)


def run(config: RunConfig) -> int:
    """On a rank: train to the end."""
    logging.basicConfig(level=logging.WARNING, force=True)  # to standard error, as outside pytest
    return run_to_end(config)


def told_by(config: RunConfig) -> tuple[int, str]:
    """On a rank: the exit code of a run, or -1 and the error that ended it, which every rank has."""
    try:
        return run(config), ""
    except UserError as error:
        if dist.get_world_size() > 1 and not isinstance(error, SharedError):
            raise
        return -1, str(error)


def run_until(config: RunConfig, steps: int) -> None:
    """On a rank: make ``steps`` of the run's steps, as if it was killed right after the last was saved."""
    config.trainer.steps, config.trainer.export = steps, False
    run(config)


def assert_the_same_run(folder: Path, other: Path) -> None:
    """Bit-equal metrics, rollouts and final weights, of six steps."""
    assert_same_run(folder, other)
    assert len(metrics_of(folder)) == 6


STATEFUL = [
    "echorl=fork_tokens", "echorl.coef=0.3", "echorl.coef_schedule=linear", "echorl.coef_warmup_steps=3",
    "echorl.coef_decay_steps=9",
]  # fmt: skip
"""The threshold and the coefficient of a step depend on the steps before it."""


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        ("TP2", "checkpoint.asynchronous=false"),
        ("TP2", "checkpoint.asynchronous=true"),
        ("DP2", "checkpoint.asynchronous=true"),
        ("DP2", "checkpoint.low_memory=true"),
    ],
)
def test_three_and_three_steps_are_six(ranks: Ranks, tmp_path: Path, layout: str, how: str) -> None:
    overrides = [*LAYOUTS[layout], "trainer.save_every=1", how, *(STATEFUL if layout == "DP2" else [])]
    ranks(2, run, run_config(tmp_path / "straight", *overrides))
    ranks(2, run_until, run_config(tmp_path / "halves", *overrides), 3)
    # what an interrupted step wrote is not counted twice
    with (tmp_path / "halves" / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "reward": 9}\n{"step": 4, "rew')
    ranks(2, run, run_config(tmp_path / "halves", *overrides, RESUME))
    assert_the_same_run(tmp_path / "halves", tmp_path / "straight")
    for folder in ("straight", "halves"):
        kept = sorted(path.name for path in (tmp_path / folder / "checkpoints").iterdir())
        assert kept == ["step-000005", "step-000006"]


@pytest.mark.parametrize(
    ("before", "after"), [("TP1", "TP2"), ("TP1", "DP2"), ("TP2", "PP2"), ("TP1", "CP2"), ("CP2", "TP2")]
)
def test_a_run_goes_on_at_another_layout(
    ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str], before: str, after: str
) -> None:
    straight, halves = (run_config(tmp_path / name, *LAYOUTS[before], "trainer.export=false") for name in "sh")
    straight.trainer.steps = 4
    ranks(world_size(straight), run, straight)
    ranks(world_size(halves), run_until, halves, 3)
    resumed = run_config(tmp_path / "h", *LAYOUTS[after], RESUME, "trainer.export=false")
    resumed.trainer.steps = 4
    ranks(world_size(resumed), run, resumed)
    expected, first = (metrics_of(tmp_path / name)[3] for name in "sh")
    assert "random states start from the seed" in capfd.readouterr().err
    assert first["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert first == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_checkpoint_holds_its_configuration_and_progress(ranks: Ranks, tmp_path: Path) -> None:
    config = run_config(tmp_path, "trainer.export=false")
    config.trainer.steps = 2
    ranks(1, run, config)
    (checkpoint,) = CheckpointFolder(tmp_path / "checkpoints").complete()
    assert (checkpoint / "config.yaml").read_text() == to_yaml(config)
    common = common_state(checkpoint)
    assert common["progress"]["step"] == 2 and common["progress"]["position"] == 8
    assert common["layout"] == {"tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "data": 1}


def test_the_best_checkpoint_is_kept(ranks: Ranks, tmp_path: Path) -> None:
    config = run_config(
        tmp_path, "trainer.save_every=1", "trainer.eval_every=1", "trainer.export=false", "checkpoint.keep_last=1",
        f"data.eval={tiny_config().data.eval}", "trainer.lr=1e-2", "rollout.max_new_tokens=12",
    )  # fmt: skip
    config.trainer.steps = 4
    ranks(1, run, config)
    rows = metrics_of(tmp_path)[1:]
    best = max((row["eval.accuracy"], row["step"] + 1) for row in rows)[1]
    kept = {path.name for path in CheckpointFolder(tmp_path / "checkpoints").complete()}
    assert kept == {"step-000004", f"step-{best:06d}"}


def _random_numbers(config: RunConfig) -> tuple[list[float], list[float]]:
    """What every generator of a rank gives, before and after a checkpoint was loaded."""
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    from echorl_nemo.engines.megatron.checkpoint import Checkpoints, Progress
    from tests.engines.megatron.helpers import trainer_of

    def draw() -> list[float]:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            parallel = float(torch.rand(()))
        return [random.random(), float(np.random.rand()), float(torch.rand(())), parallel]

    trainer = trainer_of(config)
    checkpoints = Checkpoints(Path(config.trainer.run_dir), config.checkpoint, trainer.parallel)
    random.seed(dist.get_rank())
    checkpoints.save(trainer.policy, Progress(1), "", accuracy=None)
    before = draw()
    draw()
    assert checkpoints.restore(trainer.policy) is not None
    return before, draw()


def test_random_states_of_every_rank_come_back(ranks: Ranks, tmp_path: Path) -> None:
    drawn = ranks(2, _random_numbers, run_config(tmp_path, *LAYOUTS["TP2"]))
    for before, after in drawn:
        assert before == after
    assert drawn[0][0][0] != drawn[1][0][0] and drawn[0][0][3] != drawn[1][0][3]  # each rank its own
