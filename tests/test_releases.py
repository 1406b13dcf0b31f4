"""One code for the tested releases of Megatron-Core, Megatron-Bridge and transformers."""

import configparser
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

from echorl_nemo import releases
from echorl_nemo.checks.hf_config import read_hf_config
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.engines.megatron.platform import detect_platform
from echorl_nemo.errors import UserError
from echorl_nemo.schema import ModelConfig
from tests.conftest import REPOSITORY


def test_setup_cfg_states_the_tested_range() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extra = setup["options.extras_require"]["native"]
    for package in ("megatron-core", "transformers"):
        oldest, newest = releases.TESTED[package]
        (low, high) = re.findall(rf"^{package}>=([\d.]+),<([\d.]+)$", extra, re.MULTILINE)[0]
        major, minor, *_ = (int(part) for part in newest.split("."))
        assert oldest.startswith(low) and high == f"{major}.{minor + 1}"


@pytest.mark.parametrize(
    ("release", "accepted"), [("0.16.0", True), ("0.19.9", True), ("0.15.3", False), ("0.20", False)]
)
def test_a_release_outside_the_range_is_named(monkeypatch: pytest.MonkeyPatch, release: str, accepted: bool) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release if name == "megatron-core" else real(name))
    found = releases.untested_releases()
    assert found == ([] if accepted else [
        f"megatron-core {release} is not a tested release: 0.16.1 to 0.19.2 are; see docs/compatibility.md"
    ])  # fmt: skip


@pytest.mark.parametrize("name", releases.GENERIC_TOKENIZERS)
def test_a_generic_tokenizer_does_what_its_file_says(tiny_chain: Path, tmp_path: Path, name: str) -> None:
    """Beside a config.json of Qwen2: transformers 5 would take Qwen2's own class and lose the newline."""
    folder = shutil.copytree(tiny_chain / "model", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))
    tokenizer = Tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode("9a+4b+2\n")) == "9a+4b+2\n"


def test_a_class_of_another_family_splits_alike_or_is_refused(tiny_chain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chain / "model", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"}))
    if transformers.__version__.startswith("4."):
        tokenizer = Tokenizer(str(folder))
        assert tokenizer.decode(tokenizer.encode("9a+4b+2\n")) == "9a+4b+2\n"
    else:
        with pytest.raises(UserError, match="Qwen2Tokenizer encodes .* correct tokenizer_class"):
            Tokenizer(str(folder))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_inverse_frequencies_are_those_of_the_paper(scaling: dict[str, object] | None) -> None:
    config = AutoConfig.for_model("qwen2", hidden_size=64, num_attention_heads=4, rope_theta=5e5, rope_scaling=scaling)
    frequencies, factor = releases.inverse_frequencies(config)
    expected = 5e5 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16) / (4.0 if scaling else 1.0)
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)
    assert factor == 1.0
    assert releases.rope_settings(config)["rope_theta"] == 5e5


def test_an_impossible_base_is_refused(tiny_chain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chain / "model", tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "rope_theta": 0.0}))
    with pytest.raises(UserError, match="its config.json has rope_theta=0.0"):
        read_hf_config(ModelConfig(path=str(folder)))


def test_the_stand_in_of_transformer_engine_is_none() -> None:
    """Ranks that torchrun starts look for it twice, the second time with the stand-ins in place."""
    assert not detect_platform("cpu").transformer_engine
    assert importlib.util.find_spec("transformer_engine") is not None
    assert not releases.has_transformer_engine()


def test_a_position_encoding_that_transformers_does_not_know_is_no_default() -> None:
    config = AutoConfig.for_model("qwen2")
    config.rope_parameters = config.rope_scaling = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(KeyError, match="spiral"):
        releases.inverse_frequencies(config)


def test_an_empty_transformer_engine_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package without the CUDA libraries is found and raises RuntimeError at import."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('Found empty package')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    assert not releases.has_transformer_engine()
