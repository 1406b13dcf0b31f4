"""Against the real nemo-aligner, in its own environment (`make test` makes it); elsewhere only what needs no NeMo."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("nemo_aligner") is None:
    collect_ignore = [
        "helpers.py",
        "test_actor.py",
        "test_batch.py",
        "test_example.py",
        "test_paper.py",
        "test_rewards.py",
        "test_slurm.py",
        "test_trainer.py",
    ]
else:
    from tests.engines.nemo_aligner import helpers  # before any test module: it puts the stand-ins in place

    @pytest.fixture(scope="session")
    def tiny_nemo(ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The tiny chain model as a .nemo file."""
        path = tmp_path_factory.mktemp("nemo") / "tiny_chain.nemo"
        ranks(1, helpers.write_tiny_nemo, path)
        return path


@pytest.fixture(autouse=True)
def _here(in_repository: Path) -> None: ...
