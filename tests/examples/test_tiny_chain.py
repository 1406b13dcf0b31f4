"""The embedded task's shipped folder is what its script makes (the warm start itself takes minutes and is not run)."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from echorl_nemo.report.logger import read_lines
from echorl_nemo.rewards import exact_line


@pytest.fixture(scope="module")
def make(tiny_chain: Path) -> Any:
    sys.path.insert(0, str(tiny_chain.parent))
    yield importlib.import_module("make")
    sys.path.pop(0)


def test_the_script_reproduces_prompts_and_tokenizer(make: Any, tiny_chain: Path, tmp_path: Path) -> None:
    make.write_data(tmp_path)
    make.make_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("train.jsonl", "eval.jsonl", "model/tokenizer.json", "model/tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tiny_chain / name).read_bytes()
    shapes = {name: weight.shape for name, weight in make.make_model().state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in load_file(tiny_chain / "model/model.safetensors").items()}


def test_every_solution_is_right_by_its_verifier(tiny_chain: Path) -> None:
    rows = {name: read_lines(tiny_chain / name) for name in ("train.jsonl", "eval.jsonl")}
    assert {name: len(prompts) for name, prompts in rows.items()} == {"train.jsonl": 1024, "eval.jsonl": 256}
    for row in rows["train.jsonl"] + rows["eval.jsonl"]:
        assert exact_line(row["solution"], row["answer"]) == 1.0
    prompts = [{row["prompt"] for row in part} for part in rows.values()]
    assert not prompts[0] & prompts[1]


def test_a_chain_by_example(make: Any) -> None:
    chain = make.Chain(6, ("+7", "+1", "*3"))
    assert chain.prompt == "6a+7b+1c*3"
    assert chain.solve() == ("a6+7=3\nb3+1=4\nc4*3=2\nA:2\n", 2)
    assert chain.solve({(3, "+1"): 9}) == ("a6+7=3\nb3+1=9\nc9*3=7\nA:7\n", 7)


def test_demonstrations_are_wrong_at_their_rates(make: Any) -> None:
    corruption = make.Corruption(make.SEED)
    assert sorted(corruption.rate.values()) == [0.01] * 84 + [0.15] * 24 + [0.5] * 12
    hard = next(fact for fact, rate in corruption.rate.items() if rate == 0.5)
    rng = make.random.Random(0)
    chain = make.Chain(hard[0], (hard[1],))
    wrong = sum(corruption.demonstrate(chain, rng) != chain.solve()[0] for _ in range(400))
    assert 150 < wrong < 250  # 200 expected; 50 is 5 standard deviations


def test_the_shipped_folder_is_small(tiny_chain: Path) -> None:
    assert sum(path.stat().st_size for path in tiny_chain.rglob("*") if path.is_file()) < 4 << 20
    assert sum(weight.numel() for weight in load_file(tiny_chain / "model/model.safetensors").values()) <= 500_000
