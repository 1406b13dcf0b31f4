import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.errors import UserError
from echorl_nemo.rewards import find_verifier, reference_problem, takes_row
from echorl_nemo.rewards.boxed import last_box
from tests.rewards.cases import CASES, page


@pytest.mark.parametrize(
    ("name", "response", "answer", "reward"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_every_case_of_the_documentation(name: str, response: str, answer: str, reward: float) -> None:
    assert find_verifier(name)(response, answer) == reward


def test_the_documentation_is_that_of_the_cases() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "verifiers.md"
    assert path.read_text() == page(), "make it again: python -m tests.rewards.cases"


LINEAR = r"""
import resource
from echorl_nemo.rewards.choice import choice
from echorl_nemo.rewards.exact import exact_line
from echorl_nemo.rewards.final import final_answer
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
size = 1 << 20
parts = ["Answer", "Answer ", "answer is ", r"\boxed{", r"\boxed {", "A:", "A: \n", r"\boxed{}", "####", "####\n"]
parts += ["Answer: </s>", "answer is\n</s>", "Answer: A or ", "Answer: (((", r"Answer: \text{", "\u0130", "Answer\n\n"]
texts = [part * (size // len(part)) for part in parts]
texts += ["Answer" + bytes([byte]).decode("latin-1") * size + "?" for byte in range(256)]
for text in texts:
    for read in (choice, exact_line):
        read(text, "B")
    final_answer(text)
"""


def test_what_runs_in_the_rank_takes_linear_time() -> None:
    """A megabyte of any byte, and of what the parsers look for: 819 readings take about 20 s of CPU, of 120 that the
    process may use. One with a quadratic step takes hours."""
    done = subprocess.run([sys.executable, "-c", LINEAR], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_last_box_is_that_of_a_slow_search() -> None:
    def slow(text: str) -> str | None:
        found = None
        for start in range(len(text)):
            if text.startswith(r"\boxed{", start):
                depth, at = 1, start + 7
                while at < len(text) and depth:
                    depth += {"{": 1, "}": -1}.get(text[at], 0)
                    at += 1
                if not depth:
                    found = text[start + 7 : at - 1]
        return found

    generator = random.Random(0)
    for _ in range(3000):
        text = "".join(generator.choices([r"\boxed{", "{", "}", "x", " "], k=12))
        box = last_box(text)
        assert (None if box is None else box[1]) == slow(text), text


def test_a_verifier_of_ones_own() -> None:
    assert find_verifier("tests.rewards.verifiers:answers_length")("abc", "3") == 1.0


def test_a_verifier_may_take_the_row() -> None:
    assert takes_row(find_verifier("tests.rewards.verifiers:asks_the_row"))
    for name in ("math", "choice", "tests.rewards.verifiers:answers_length", "tests.rewards.verifiers:with_options"):
        assert not takes_row(find_verifier(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("judge", "verifier='judge' is not known; use one of math, exact_line, choice, or your own"),
        ("nowhere.at_all:x", "verifier=nowhere.at_all:x: it cannot be imported: No module named 'nowhere'"),
        ("tests.rewards.verifiers:nothing", "cannot be imported: module .* has no attribute 'nothing'"),
        ("tests.rewards.verifiers:NUMBER", "is not a function"),
        ("tests.rewards.verifiers:of_four", r"is not a function of \(response, answer\) or \(response, answer, row\)"),
    ],
)
def test_unknown_verifiers_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_verifier(name)


@pytest.mark.parametrize("answer", ["2", "Paris", "AB", "K", "A or B"])
def test_a_reference_that_nothing_matches_is_refused(answer: str) -> None:
    assert "is not a letter from A to J" in reference_problem("choice", answer)
    assert reference_problem("math", answer) == ""


@pytest.mark.parametrize("answer", ["B", "(B)", "B.", r"\text{b}", " b "])
def test_a_decorated_reference_is_a_letter(answer: str) -> None:
    assert reference_problem("choice", answer) == ""


def test_the_verifier_of_the_readme() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    code = readme.split("```python\nimport subprocess")[1].split("\n```\n")[0]
    names: dict[str, Any] = {}
    exec("import subprocess" + code, names)
    row = {"tests": ["assert double(2) == 4"]}
    for body, reward in (("2 * x", 1.0), ("3 * x", 0.0), ("", 0.0)):
        response = f"So:\n```python\ndef double(x):\n    return {body}\n```\nDone."
        assert names["passes_tests"](response, "", row) == reward
