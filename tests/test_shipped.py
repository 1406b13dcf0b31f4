"""The files that come with the package. `.ci/wheel` builds a wheel and runs it without the checkout."""

import runpy
from pathlib import Path
from unittest import mock

import pytest

from echorl_nemo import shipped

REPOSITORY = Path(__file__).resolve().parents[1]


def test_a_wheel_holds_what_the_package_looks_for() -> None:
    with mock.patch("setuptools.setup"):
        names = runpy.run_path(str(REPOSITORY / "setup.py"))["SHIPPED"]
    for path in (shipped.CONFIG_DIR, shipped.CONSTRAINTS, shipped.ALIGNER_SCRIPT):
        place = path.relative_to(shipped.ROOT)
        assert path.exists() and any(place.is_relative_to(name) for name in names)
    manifest = (REPOSITORY / "MANIFEST.in").read_text().split()
    assert set(names) <= set(manifest)


def test_a_version_of_the_constraints() -> None:
    assert shipped.pinned("torch").startswith("torch==")
    with pytest.raises(LookupError, match=r"constraints.txt does not name torc$"):
        shipped.pinned("torc")
