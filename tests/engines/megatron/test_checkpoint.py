"""A resumed run goes on as if it had not stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.config import to_yaml
from echorl_nemo.engines.megatron.checks import check, newest_checkpoint
from echorl_nemo.engines.megatron.layout import world_size
from echorl_nemo.engines.megatron.worker import run_rank
from echorl_nemo.report.logger import METRICS_FILE, ROLLOUTS_FILE, read_lines
from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import LAYOUTS, PLATFORM, tiny_config


def _run(config: RunConfig) -> None:
    run_rank(config, to_yaml(config), check(config), PLATFORM)


def train(ranks: Callable[..., list[Any]], folder: Path, steps: int, *overrides: str) -> list[dict[str, Any]]:
    config = tiny_config(
        f"trainer.run_dir={folder}", f"trainer.steps={steps}", "trainer.export=false", "data.eval=null",
        "logger.rollouts_every=1", "rollout.max_new_tokens=24", "trainer.minibatch_prompts=2", *overrides,
    )  # fmt: skip
    ranks(world_size(config), _run, config)
    return [
        {name: value for name, value in row.items() if not name.startswith("time") and name != "tokens_per_second"}
        for row in read_lines(folder / METRICS_FILE)
    ]


@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_resumed_metrics_are_bit_equal(ranks: Callable[..., list[Any]], tmp_path: Path, layout: str) -> None:
    straight = train(ranks, tmp_path / "straight", 4, *LAYOUTS[layout])
    train(ranks, tmp_path / "halves", 2, *LAYOUTS[layout])
    # what an interrupted step wrote is not counted twice
    with (tmp_path / "halves" / METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "reward": 9}\n{"step": 3, "rew')
    halves = train(ranks, tmp_path / "halves", 4, *LAYOUTS[layout], "trainer.resume=true")
    assert halves == straight and [row["step"] for row in halves] == [0, 1, 2, 3]
    assert read_lines(tmp_path / "halves" / ROLLOUTS_FILE) == read_lines(tmp_path / "straight" / ROLLOUTS_FILE)


def test_a_run_goes_on_in_another_layout(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    straight = train(ranks, tmp_path / "straight", 3, *LAYOUTS["TP2"])
    train(ranks, tmp_path / "halves", 2, *LAYOUTS["TP2"])
    halves = train(ranks, tmp_path / "halves", 3, *LAYOUTS["PP2"], "trainer.resume=true")
    assert halves[-1] == pytest.approx(straight[-1], rel=1e-4, abs=1e-6)


def test_only_complete_checkpoints_are_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for name in ("step-000002", "step-000010", "step-000012.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000010"
