"""A checkpoint of one tested release of Megatron-Core resumes and exports under every other."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echorl_nemo.engines.megatron.worker import export_rank
from echorl_nemo.releases import TESTED
from tests.conftest import REPOSITORY
from tests.engines.megatron.helpers import PLATFORM, tiny_config
from tests.engines.megatron.release_checkpoints import DATA, metrics_of_last_step, run_overrides, train

Ranks = Callable[..., list[Any]]


@pytest.fixture(params=TESTED["megatron-core"])
def unpacked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that a release of Megatron-Core left after two steps, as the working directory."""
    with tarfile.open(DATA / f"core-{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_resumes(ranks: Ranks, unpacked: Path) -> None:
    expected = load_file(unpacked / "run" / "export" / "model.safetensors")
    assert ranks(1, train, "trainer.resume=true") == [0]
    metrics = json.loads((unpacked / "run" / "last_step.json").read_text(encoding="utf-8"))
    assert metrics["step"] == 2 and metrics["optimizer_steps"] == 2
    assert metrics_of_last_step() == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    weights = load_file(unpacked / "run" / "export" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def _export(out: Path) -> None:
    config = tiny_config(*run_overrides())
    config.parallel.tensor = torch.distributed.get_world_size()
    export_rank(config, Path("run") / "checkpoints" / "step-000002", out, PLATFORM)


def test_it_exports_at_any_layout(ranks: Ranks, unpacked: Path) -> None:
    ranks(1, _export, unpacked / "one")
    ranks(2, _export, unpacked / "two")
    one, two, start = (load_file(unpacked / name / "model.safetensors") for name in ("one", "two", "model"))
    assert one.keys() == two.keys() == start.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], start[name]) for name in one if name.endswith("proj.weight"))
