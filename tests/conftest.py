"""Fixtures of all tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from tests.ranks import run_ranks

# a busy machine is no defect
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

torch.set_num_threads(1)  # a thread pool of this process would not survive in the ranks that it forks

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """Runs a function on real gloo ranks: ``ranks(world, function, *args)`` gives each rank's result, in order."""
    return run_ranks


@pytest.fixture(scope="session")
def tiny_chain() -> Path:
    """The embedded task's shipped folder."""
    return REPOSITORY / "examples" / "tiny_chain" / "made"


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as the working directory, where the shipped configs find the tiny task."""
    monkeypatch.chdir(REPOSITORY)
    return REPOSITORY
