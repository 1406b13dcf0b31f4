"""Every data config reads its dataset's columns: a shipped sample of three rows with the hub's schema, from a file and
from a folder."""

import json
from pathlib import Path

import datasets
import pytest

from echorl_nemo.config import load_config
from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.rewards import find_verifier
from echorl_nemo.schema import RunConfig
from echorl_nemo.shipped import CONFIG_DIR

DATA = sorted(path.stem for path in (CONFIG_DIR / "data").glob("*.yaml") if path.stem != "tiny-chain")
SAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"
ANSWERS = {
    "dapo-math-17k": ["34", "113", "6"],
    "gsm8k": ["12", "1500", "6"],
    "jsonl": ["5/6", "14", "3"],
    "math": [r"\frac{3}{4}", "x^2+2x+1", r"\text{(A)}"],
    "openr1-math-46k": ["9", r"\frac{1}{2}", "24"],
}


def test_there_is_a_sample_of_each() -> None:
    assert sorted(ANSWERS) == DATA == sorted(path.stem for path in SAMPLES.glob("*.jsonl"))


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("name", DATA)
def test_prompts_answers_and_verifier(name: str, form: str, tiny_chain: Path, tmp_path: Path) -> None:
    source = SAMPLES / f"{name}.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    if form == "folder":
        source = tmp_path / name
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(source))
    config = load_config("train", ["model.path=x", f"data={name}", f"data.train={source}"], schema=RunConfig)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer = Tokenizer(str(tiny_chain / "model"), chat_template=template)
    prompts = PromptData(config.data.train, config.data, tokenizer, field="data.train").all()
    assert [prompt.answer for prompt in prompts] == ANSWERS[name]
    verifier = find_verifier(config.data.reward)
    for prompt in prompts:
        assert ("\\boxed{}" in prompt.text) == (name != "jsonl") and "<user>" in prompt.text
        assert ("<system>" in prompt.text) == (name == "openr1-math-46k")
        assert verifier(rf"So it is \boxed{{{prompt.answer}}}.", prompt.answer) == 1.0
        assert verifier(r"So it is \boxed{-17}.", prompt.answer) == 0.0
