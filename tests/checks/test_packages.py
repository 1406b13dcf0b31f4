"""What a command says where packages are missing. `.ci/wheel` looks at a real environment that lacks them."""

import configparser
import re
import sys
from pathlib import Path

import pytest

from echorl_nemo.checks import packages
from echorl_nemo.checks.packages import BRIDGE, NATIVE, is_installed, require_packages
from echorl_nemo.config import load_config
from echorl_nemo.errors import UserError
from echorl_nemo.schema import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_native_engine_asks_for_the_packages_of_its_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extra = {re.split(r"[\[<>=]", line)[0] for line in setup["options.extras_require"]["native"].split()}
    assert {*NATIVE.values()} == extra | {"torch"}


def test_an_environment_with_everything_passes() -> None:
    require_packages("train")
    require_packages("report")


@pytest.mark.parametrize("module", [*NATIVE, *BRIDGE])
def test_each_missing_package_is_named_with_the_line_that_installs_it(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: name != module)
    package = {**NATIVE, **BRIDGE}[module]
    with pytest.raises(UserError, match=rf"^echorl-nemo plan: {package} is not installed; run pip install .*$"):
        require_packages("plan")


def test_everything_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: False)
    with pytest.raises(UserError) as error:
        require_packages("train")
    message = str(error.value)
    assert "\n" not in message and "constraints.txt and pip install --no-deps megatron-bridge==" in message


def test_a_namespace_without_code_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hollow" / "inner").mkdir(parents=True)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "whole" / "part.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = {name: is_installed(name) for name in ("hollow", "hollow.inner", "whole", "whole.part", "whole.other")}
    assert found == {"hollow": False, "hollow.inner": False, "whole": True, "whole.part": True, "whole.other": False}


def test_trackers_that_are_not_installed_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: False)
    config = load_config("quickstart", ["logger.wandb_project=mine", "rollout.engine=trtllm"], schema=RunConfig)
    printed = "\n".join(packages.package_problems(config))
    assert "logger.wandb_project=mine: the package wandb is not installed; install it, or use null" in printed
    assert "rollout.engine=trtllm: the package tensorrt_llm is not installed" in printed
