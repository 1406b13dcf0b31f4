"""Container images hold what the Dockerfile expects of them, or the build stops."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from packaging.version import Version

from echorl_nemo.image_versions import mismatches
from echorl_nemo.releases import TESTED
from echorl_nemo.shipped import ROOT

STAGES = re.findall(r"^FROM \$\{(\w+)\} AS (\w+)$(.*?)(?=^FROM|\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S)


def test_releases_by_their_first_numbers() -> None:
    torch = importlib.metadata.version("torch")
    major, minor = torch.split(".")[:2]
    assert mismatches([f"torch={major}.{minor}", f"torch={major}", f"torch={torch.partition('+')[0]}"]) == []
    (line,) = mismatches([f"torch={major}.{minor[0]}0{minor}"])
    assert line.startswith(f"torch is {torch} in this image, and ")
    (line,) = mismatches(["no-such-package=1.0"])
    assert line == "no-such-package is not in this image, and 1.0 is expected; name another image"


def test_a_prefix_of_digits_is_no_release() -> None:
    """0.1 is not 0.16."""
    release = Version(importlib.metadata.version("megatron-core"))
    assert mismatches([f"megatron-core={release.major}.{str(release.minor)[0]}"])


@pytest.mark.parametrize(("argument", "code"), [("torch=0.1", 1), ("torch", 1), ("setuptools=", 1)])
def test_the_command_fails_with_a_line(argument: str, code: int) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "echorl_nemo.image_versions", argument], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == code and found.stderr.startswith("error: ") and len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(("argument", "target", "body"), STAGES)
def test_every_stage_names_what_it_expects(argument: str, target: str, body: str) -> None:
    if target == "cpu":
        return
    (command,) = re.findall(r"(?:image_versions|add_to_nemo\.sh) ((?:[\w-]+=[\d.]+ ?)+)", body)
    expected = dict(entry.split("=") for entry in command.split())
    assert expected
    for package in TESTED.keys() & expected.keys():
        oldest, newest = (Version(each).release[:2] for each in TESTED[package])
        assert oldest <= Version(expected[package]).release[:2] <= newest, f"{target}: {package} is outside setup.cfg's"
    assert f"`{target}`" in (ROOT / "slurm" / "README.md").read_text()


def test_there_is_a_stage_for_each_image() -> None:
    assert {target for _, target, _ in STAGES} == {
        "cpu", "nemo_aligner", "nemo_rl", "native", "nemo_26_06", "nemo_26_04",
    }  # fmt: skip
