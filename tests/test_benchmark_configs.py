"""Every benchmark config reads its dataset's columns: a shipped sample of three rows with the hub's schema."""

from pathlib import Path

import pytest

from echorl_nemo.config import load_config
from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.rewards import find_verifier
from echorl_nemo.schema import EvaluateConfig
from echorl_nemo.shipped import CONFIG_DIR

BENCHMARKS = sorted(path.stem for path in (CONFIG_DIR / "benchmark").glob("*.yaml") if path.stem != "none")
SAMPLES = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"

ANSWERS = {
    "aime24": ["55", "24", "24"],
    "aime25": ["55", "24", "24"],
    "amc23": ["55", "24", "24"],
    "math500": [r"\frac{3}{4}", "x^2+2x+1", "7"],
    "minerva": ["30", "600", "12"],
    "olympiadbench": [r"\frac{3}{4}", "x^2+2x+1", "7"],
    "gsm8k": ["12", "1500", "6"],
    "arc_c": ["B", "A", "D"],
    "gpqa_diamond": ["B", "C", "B"],  # in the alphabetical order of the choices
    "mmlu_pro": ["B", "A", "D"],
}


def test_there_is_a_sample_of_each() -> None:
    assert sorted(ANSWERS) == BENCHMARKS == sorted(path.stem for path in SAMPLES.glob("*.jsonl"))
    assert len(BENCHMARKS) == 10


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_answers_and_verifier(name: str, tiny_chain: Path) -> None:
    config = load_config("evaluate", ["model.path=x", f"benchmark={name}"], schema=EvaluateConfig)
    tokenizer = Tokenizer(str(tiny_chain / "model"))
    tokenizer.hf.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    data = PromptData(str(SAMPLES / f"{name}.jsonl"), config.data, tokenizer, field="data.eval")
    prompts = data.all()
    assert [prompt.answer for prompt in prompts] == ANSWERS[name]
    verifier = find_verifier(config.data.reward)
    for prompt in prompts:
        boxed = config.data.reward == "math"
        assert ("\\boxed{}" in prompt.text) == boxed and ("Answer: X" in prompt.text) != boxed
        assert boxed or f"\n{prompt.answer}) " in prompt.text
        right = rf"So it is \boxed{{{prompt.answer}}}." if boxed else f"Because of this.\nAnswer: {prompt.answer}"
        wrong = r"So it is \boxed{-17}." if boxed else "Answer: " + ("A" if prompt.answer != "A" else "B")
        assert verifier(right, prompt.answer) == 1.0 and verifier(wrong, prompt.answer) == 0.0
    if name == "gpqa_diamond":
        assert "A) glass\nB) iron\nC) paper\nD) wood\n" in prompts[0].text
