import json
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.data.config import DataConfig
from echorl_nemo.data.prompts import PromptData
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_chain: Path) -> Tokenizer:
    return Tokenizer(str(tiny_chain / "model"))


def load(tokenizer: Tokenizer, path: Path, *lines: Any, **settings: Any) -> PromptData:
    encoded = (
        line if isinstance(line, bytes) else f"{line if isinstance(line, str) else json.dumps(line)}".encode()
        for line in lines
    )
    path.write_bytes(b"\n".join(line.rstrip(b"\n") for line in encoded) + b"\n")
    return PromptData(str(path), DataConfig(train=str(path), **settings), tokenizer, field="data.train")


def test_prompts_are_read_with_their_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"question": "6a+7b*3", "target": 9}
    data = load(tokenizer, tmp_path / "x.jsonl", row, "\n", row, prompt_key="question", answer_key="target")
    assert len(data) == 2
    prompt = data.all()[0]
    assert (prompt.text, prompt.answer) == ("6a+7b*3", "9")
    assert tokenizer.decode(prompt.tokens) == "6a+7b*3" and len(prompt.tokens) == 5


def test_every_prompt_comes_once_an_epoch_in_an_order_fixed_by_the_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = load(tokenizer, tmp_path / "x.jsonl", *({"prompt": f"{i}a+{i}", "answer": i} for i in range(1, 10)))
    steps = [data.sequence(6 * step, 6, seed=3) for step in range(3)]
    asked = [prompt for prompts in steps for prompt in prompts]
    first, second = [p.answer for p in asked[:9]], [p.answer for p in asked[9:]]
    assert sorted(first) == sorted(second) == [str(i) for i in range(1, 10)]
    assert first != second
    assert [p.group_id for p in asked] == list(range(18))
    assert [p.answer for p in data.sequence(6, 6, seed=3)] == [p.answer for p in steps[1]]
    assert [p.answer for p in data.sequence(0, 9, seed=4)] != first
    assert [p.answer for p in data.sequence(0, 9, seed=2**53)] != first


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (['{"prompt": "6a+7", "answer": 3}\n', "{oops\n"], {}, r"x.jsonl:2: not JSON in UTF-8 .*one JSON object"),
        ([b"\xff\xfe\n"], {}, "x.jsonl:1: not JSON in UTF-8"),
        ([{"prompt": "", "answer": "3"}], {}, "x.jsonl:1: prompt is empty; drop the line"),
        (["[1]\n"], {}, "x.jsonl:1: a JSON list, not an object"),
        (["\n"], {}, "data.train=.*x.jsonl holds no prompt"),
        (
            [{"question": "6a+7"}],
            {},
            "x.jsonl:1: prompt=None is neither a text.*the row has question: see data.prompt_key",
        ),
        ([{"prompt": "6a+7"}], {}, "x.jsonl:1: answer=None is not a text or a number; see data.answer_key"),
        (
            [{"prompt": "6a+7b+7", "answer": "0"}],
            {"max_prompt_tokens": 4},
            "x.jsonl:1: the prompt has 5 tokens, data.max_prompt_tokens=4; raise the limit, drop the line, or set",
        ),
        (
            [{"prompt": "6a+7", "answer": "3"}],
            {"chat_template": True},
            "x.jsonl:1: .*the tokenizer has no chat template",
        ),
    ],
)
def test_bad_data_names_file_line_and_remedy(
    tokenizer: Tokenizer, tmp_path: Path, lines: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(tokenizer, tmp_path / "x.jsonl", *lines, **settings)


def test_a_missing_file_names_its_key(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data.eval=nowhere.jsonl: there is no such file"):
        PromptData("nowhere.jsonl", DataConfig(train="x"), tokenizer, field="data.eval")


def test_messages_go_through_the_chat_template(tokenizer: Tokenizer, tmp_path: Path, tiny_chain: Path) -> None:
    chat = Tokenizer(str(tiny_chain / "model"))
    chat.hf.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    messages = [{"role": "user", "content": "6a+7"}]
    for row, settings in (
        ({"prompt": messages, "answer": "3"}, {}),
        ({"prompt": "6a+7", "answer": "3"}, {"chat_template": True}),
    ):
        assert load(chat, tmp_path / "x.jsonl", row, **settings).all()[0].text == "6a+7="
    with_system = load(chat, tmp_path / "x.jsonl", {"prompt": messages, "answer": "3"}, system_prompt="1")
    assert with_system.all()[0].text == "16a+7="


def test_templates_make_prompt_and_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"start": 6, "steps": ["a+7", "b*3"], "answer": "6+7=3, 3*3=9 #### 9"}
    settings = {
        "prompt_template": "{{ start }}{{ steps | join('') }}",
        "answer_template": "{{ answer.split('####')[-1].strip() }}",
    }
    prompt = load(tokenizer, tmp_path / "x.jsonl", row, **settings).all()[0]
    assert (prompt.text, prompt.answer) == ("6a+7b*3", "9")
    with pytest.raises(UserError, match=r"x.jsonl:1: data.prompt_template: 'question' is undefined; the row has start"):
        load(tokenizer, tmp_path / "x.jsonl", row, prompt_template="{{ question }}")
    with pytest.raises(UserError, match="data.prompt_template: not a Jinja template"):
        load(tokenizer, tmp_path / "x.jsonl", row, prompt_template="{{ question")


def test_long_prompts_are_left_out_when_asked(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "6a+7", "answer": 3}, {"prompt": "6a+7b+7", "answer": 0}]
    data = load(tokenizer, tmp_path / "x.jsonl", *rows, max_prompt_tokens=4, drop_long_prompts=True)
    assert [prompt.text for prompt in data.all()] == ["6a+7"]
    assert "1 of 2 prompts are longer than 4 tokens and left out" in caplog.text
    with pytest.raises(UserError, match=r"holds no prompt \(2 were longer than data.max_prompt_tokens\)"):
        load(tokenizer, tmp_path / "x.jsonl", *rows, max_prompt_tokens=2, drop_long_prompts=True)


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved-splits"])
def test_datasets_in_files_and_folders(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "6a+7", "answer": "3"}, {"prompt": "1a+1", "answer": "2"}])
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x")
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(path)
    config = DataConfig(train=str(path))
    data = PromptData(str(path), config, tokenizer, field="data.train", split="test")
    assert [p.text for p in data.all()] == (["1a+1"] if kind == "saved-splits" else ["6a+7", "1a+1"])
    if kind == "saved-splits":
        with pytest.raises(UserError, match=r"data.eval=.*x \(subset None, split validation\)"):
            PromptData(str(path), config, tokenizer, field="data.eval", split="validation")


def test_what_is_no_source_is_reported(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="data.train=/no where: there is no such file, folder or hub dataset"):
        PromptData("/no where", DataConfig(train="x"), tokenizer, field="data.train")


ROW = {"prompt": "6a+7", "answer": "3", "solution": "a6+7=3\nA:3\n"}


def demonstrations(tokenizer: Tokenizer, path: Path, *rows: Any, limit: int = 20, **settings: Any) -> PromptData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), **settings)
    return PromptData(str(path), config, tokenizer, field="data.train", longest_solution=limit)


def test_solutions_come_with_their_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = demonstrations(tokenizer, tmp_path / "x.jsonl", ROW)
    assert data.all()[0].solution == ROW["solution"] and data.longest_solution == 10
    assert load(tokenizer, tmp_path / "x.jsonl", ROW).all()[0].solution == ""  # nothing asks for it


def test_solutions_of_another_file_are_found_by_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}a+{i}", "answer": i} for i in (1, 2, 3)]
    other = tmp_path / "solutions.jsonl"
    other.write_text("".join(json.dumps({**row, "worked": f"a{row['answer']}"}) + "\n" for row in reversed(rows)))
    settings: dict[str, Any] = {"solutions": str(other), "solution_key": "worked"}
    data = demonstrations(tokenizer, tmp_path / "x.jsonl", *rows, **settings)
    assert [prompt.solution for prompt in data.all()] == ["a1", "a2", "a3"]
    with pytest.raises(UserError, match="x.jsonl:4: data.solutions has no worked of this prompt: algo.demonstrations"):
        demonstrations(tokenizer, tmp_path / "x.jsonl", *rows, {"prompt": "9a+9", "answer": 8}, **settings)
    with pytest.raises(UserError, match="data.solutions=.*there is no such file"):
        demonstrations(tokenizer, tmp_path / "x.jsonl", ROW, solutions=str(tmp_path / "none.jsonl"))


def test_bad_solutions_name_file_and_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    missing = {"prompt": "6a+7", "answer": "3"}
    with pytest.raises(UserError) as caught:
        demonstrations(tokenizer, tmp_path / "x.jsonl", ROW, missing, {**missing, "solution": 7}, ROW, limit=9)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "x.jsonl:1: solution has 10 tokens with its end, rollout.max_new_tokens=9; raise the limit or" in lines[0]
    assert "x.jsonl:2: solution=None: algo.demonstrations needs a solution of every prompt; add it or drop" in lines[1]
    assert "x.jsonl:3: solution=7: algo.demonstrations needs a solution" in lines[2]
