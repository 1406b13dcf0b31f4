"""Malformed rows: each is named with its file and line, all of them at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.data.config import DataConfig, ExtraReward
from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.source import SHOWN_ROWS
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError

GOOD: dict[str, Any] = {"prompt": "6a+7", "answer": "3"}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def _message(content: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], "answer": "3"}


ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no JSON": ("{oops", {}, "not JSON in UTF-8"),
    "no UTF-8": (b"\xff\xfe", {}, "not JSON in UTF-8"),
    "deep JSON": ("[" * 100_000, {}, "not JSON in UTF-8"),
    "a list": ("[1]", {}, "a JSON list, not an object"),
    "a number": ("3", {}, "a JSON int, not an object"),
    "null": ("null", {}, "a JSON NoneType, not an object"),
    "no prompt": ({"answer": "3"}, {}, "prompt=None is neither a text"),
    "null prompt": ({**GOOD, "prompt": None}, {}, "prompt=None is neither a text"),
    "number for a prompt": ({**GOOD, "prompt": 5}, {}, "prompt=5 is neither a text"),
    "empty prompt": ({**GOOD, "prompt": ""}, {}, "prompt is empty"),
    "no messages": ({**GOOD, "prompt": []}, {}, "prompt is empty"),
    "messages without a role": ({**GOOD, "prompt": [{"content": "x"}]}, {}, "nor a list of chat messages"),
    "messages of texts": ({**GOOD, "prompt": ["x"]}, {}, "nor a list of chat messages"),
    "null content": (_message(None), {}, "the content of a user message is None"),
    "number for content": (_message(5), {}, "the content of a user message is 5"),
    "an image": (_message([{"type": "image", "url": "x"}]), {}, "the content of a user message is"),
    "a part without a text": (_message([{"type": "text"}]), {}, "the content of a user message is"),
    "half a surrogate in a prompt": ({**GOOD, "prompt": "\ud83d"}, {}, "prompt holds '\\ud83d', half of a surrogate"),
    "half a surrogate in content": (_message("\ud83d"), {}, "half of a surrogate pair"),
    "half a surrogate in an answer": ({**GOOD, "answer": "\ud83d"}, {}, "answer holds '\\ud83d'"),
    "no answer": ({"prompt": "6a+7"}, {}, "answer=None is not a text or a number"),
    "null answer": ({**GOOD, "answer": None}, {}, "answer=None is not a text or a number"),
    "list for an answer": ({**GOOD, "answer": ["1", "2"]}, {}, "is not a text or a number"),
    "object for an answer": ({**GOOD, "answer": {"a": 1}}, {}, "is not a text or a number"),
    "empty answer": ({**GOOD, "answer": ""}, {}, "answer='' is empty: no response could match it"),
    "blank answer": ({**GOOD, "answer": " \n"}, {}, "is empty: no response could match it"),
    "NaN answer": ('{"prompt": "6a+7", "answer": NaN}', {}, "answer=nan is not a text or a number"),
    "infinite answer": ('{"prompt": "6a+7", "answer": Infinity}', {}, "answer=inf is not a text or a number"),
    "several lines for exact_line": ({**GOOD, "answer": "1\n2"}, {"reward": "exact_line"}, "has several lines"),
    "no letter for a further reward": (
        {**GOOD, "answer": "2"}, {"extra_rewards": [ExtraReward(name="choice", weight=0.1)]}, "'2' is not a letter",
    ),
    "blank prompt": ({**GOOD, "prompt": " \n"}, {}, "prompt is empty"),
    "the assistant's turn last": (
        {**GOOD, "prompt": [{"role": "user", "content": "6a+7"}, {"role": "assistant", "content": "3"}]}, {},
        "the last message is the assistant's",
    ),
    "template of a method": ({**GOOD, "x": "5"}, {"answer_template": "{{ x.upper }}"}, "is not a text or a number"),
    "template that runs code": (
        GOOD, {"answer_template": "{{ cycler.__init__.__globals__.os.getcwd() }}"}, "data.answer_template: access to",
    ),
    "digits without end": ('{"prompt": "6a+7", "answer": ' + "1" * 5000 + "}", {}, "not JSON in UTF-8"),
    "no letter": ({**GOOD, "answer": "2"}, {"reward": "choice"}, "'2' is not a letter from A to J"),
    "template of null": (
        {**GOOD, "reward_model": {"ground_truth": None}}, {"answer_template": "{{ reward_model.ground_truth }}"},
        "data.answer_template: None is not a text or a number",
    ),
    "template of a list": (
        {**GOOD, "reward_model": {"ground_truth": ["1", "2"]}}, {"answer_template": "{{ reward_model.ground_truth }}"},
        "data.answer_template: ['1', '2'] is not a text or a number",
    ),
    "template that gives nothing": ({**GOOD, "x": ""}, {"answer_template": "{{ x }}"}, "data.answer_template='' is"),
    "template without a box": ({**GOOD, "x": "5"}, {"answer_template": "{{ x | last_boxed }}"}, "no \\boxed{} that"),
    "template that divides by 0": (GOOD, {"answer_template": "{{ 1 / 0 }}"}, "data.answer_template: division by zero"),
    "template of a column that is not there": (GOOD, {"prompt_template": "{{ q }}"}, "'q' is undefined"),
    "prompt template of null": ({**GOOD, "q": None}, {"prompt_template": "{{ q }}"}, "data.prompt_template: None is"),
    "system prompt without a template": (GOOD, {"system_prompt": "Be short."}, "data.system_prompt has no effect"),
    "longer than allowed": ({**GOOD, "prompt": "6a+7b+7"}, {"max_prompt_tokens": 4}, "the prompt has 5 tokens"),
}  # fmt: skip


def _lines(*rows: Any) -> bytes:
    encoded = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    return b"\n".join(encoded) + b"\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_chain: Path) -> Tokenizer:
    loaded = Tokenizer(str(tiny_chain / "model"))
    loaded.hf.chat_template = CHAT
    return loaded


def problems(path: Path, tokenizer: Tokenizer, **settings: Any) -> list[str]:
    config = DataConfig(train=str(path), **settings)
    with pytest.raises(UserError) as caught:
        PromptData(str(path), config, tokenizer, field="data.train")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", ROWS)
def test_a_malformed_row(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    row, settings, message = ROWS[name]
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines(row))
    (problem,) = problems(path, tokenizer, **settings)
    assert problem.startswith(f"{path}:1: ") and message in problem


def test_every_bad_row_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[Any] = [GOOD] * 40
    for line in (17, 21, 31):
        rows[line - 1] = {**GOOD, "answer": ""}
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines(*rows))
    assert [problem.split(":")[1] for problem in problems(path, tokenizer)] == ["17", "21", "31"]
    path.write_bytes(_lines(*["{"] * 50))
    found = problems(path, tokenizer)
    assert len(found) == SHOWN_ROWS + 1 and found[-1] == "and 30 further rows"


def load(path: Path, tokenizer: Tokenizer, **settings: Any) -> PromptData:
    return PromptData(str(path), DataConfig(train=str(path), **settings), tokenizer, field="data.train")


def test_what_is_unusual_and_right(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + _lines(_message([{"type": "text", "text": "2a"}, {"type": "text", "text": "+1"}]))
    )
    assert load(path, tokenizer).all()[0].text == "2a+1"
    path.write_bytes(_lines({"row": "6a+7", "self": "1a+1", "answer": 3}))
    assert load(path, tokenizer, prompt_template="{{ row }}").all()[0].text == "6a+7"
    assert load(path, tokenizer, prompt_template="{{ row }}\n").all()[0].text == "6a+7\n"
    path.write_bytes(_lines({"q": "6a+7", "self": "1a+1", "answer": 3}))
    assert load(path, tokenizer, prompt_template="{{ q }}").all()[0].text == "6a+7"
    assert load(path, tokenizer, prompt_template="{{ row['self'] }}").all()[0].text == "1a+1"
    path.write_bytes(_lines({"the prompt": "6a+7", "answer": 3}))
    assert load(path, tokenizer, prompt_template="{{ row['the prompt'] }}").all()[0].text == "6a+7"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_are_read(tokenizer: Tokenizer, tmp_path: Path, suffix: str) -> None:
    path, comma = tmp_path / f"x{suffix}", "," if suffix == ".csv" else "\t"
    path.write_text(f"prompt{comma}answer\n6a+7{comma}3\n1a+1{comma}2\n")
    assert [(p.text, p.answer) for p in load(path, tokenizer).all()] == [("6a+7", "3"), ("1a+1", "2")]
    path.write_text(f"prompt{comma}answer\n6a+7{comma}\n")
    assert "x" in path.name and f"{path}:1: answer='' is empty" in problems(path, tokenizer)[0]
    path.write_text(f"prompt{comma}answer\n6a+7{comma}007\n1a+1{comma}NA\n")
    assert [p.answer for p in load(path, tokenizer).all()] == ["007", "NA"]
    path.write_text(f"prompt{comma}answer\n6a+7{comma}1{comma}3\n6a+7\n")
    assert [problem.split(": ")[1] for problem in problems(path, tokenizer)] == [
        "the row and the header have different numbers of values; correct it"
    ] * 2
    path.write_bytes(b"prompt\xff\n")
    assert "not a table in UTF-8" in problems(path, tokenizer)[0]


def test_the_fingerprint_is_of_the_rows(tiny_chain: Path, tmp_path: Path) -> None:
    """A chat template may print the date: the next day the prompts are others, and the data the same."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines(_message("6a+7"), _message("1a+1")))
    today = Tokenizer(str(tiny_chain / "model"), chat_template=CHAT + "1")
    tomorrow = Tokenizer(str(tiny_chain / "model"), chat_template=CHAT + "2")
    first, second = load(path, today), load(path, tomorrow)
    assert first.all()[0].tokens != second.all()[0].tokens and first.fingerprint == second.fingerprint
    path.write_bytes(_lines(_message("6a+7"), _message("1a+2")))
    assert load(path, today).fingerprint != first.fingerprint


def test_rows_travel_to_verifiers_that_take_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines({**GOOD, "tests": ["assert f(1) == 2"]}))
    assert load(path, tokenizer).all()[0].row is None
    prompt = load(path, tokenizer, reward="tests.rewards.verifiers:asks_the_row").sequence(0, 1, seed=0)[0]
    assert prompt.row == {**GOOD, "tests": ["assert f(1) == 2"]}
