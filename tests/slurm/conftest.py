"""One cluster for all tests of the batch scripts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs, slurm_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of two nodes; `.ci/run` installs it."""
    if os.geteuid() != 0 or (missing := missing_programs()):
        pytest.skip(f"needs root and Debian's slurmctld, slurmd, slurm-client and munge; missing: {missing}")
    folder: Path = tmp_path_factory.mktemp("slurm")
    with slurm_cluster(folder) as running:
        yield running
