"""One cluster for all tests of the batch scripts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, slurm_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of two nodes."""
    if lacking := missing():
        pytest.skip(f"a cluster needs {', '.join(lacking)}")
    folder: Path = tmp_path_factory.mktemp("slurm")
    with slurm_cluster(folder) as running:
        yield running
