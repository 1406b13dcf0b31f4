"""The shipped configs name the tiny task relative to the repository."""

from pathlib import Path

import pytest

from tests.engines.megatron import helpers  # noqa: F401  before any test module: it puts the platform in place


@pytest.fixture(autouse=True)
def _here(in_repository: Path) -> None: ...
