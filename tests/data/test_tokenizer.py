import json
import shutil
from pathlib import Path

import pytest

from echorl_nemo.data import tokenizer as tokenizer_module
from echorl_nemo.data.tokenizer import Tokenizer
from echorl_nemo.echo import boundary_ids, segment_steps
from echorl_nemo.errors import UserError


def test_stop_tokens_include_those_of_the_generation_config(tiny_chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_chain / "model", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 25]}))
    assert Tokenizer(str(folder)).stop_ids == (1, 25)
    (folder / "generation_config.json").unlink()
    assert Tokenizer(str(folder)).stop_ids == (1,)


def test_the_tiny_task_has_one_boundary_and_a_line_is_a_step(tiny_chain: Path) -> None:
    import torch

    tokenizer = Tokenizer(str(tiny_chain / "model"))
    (newline,) = boundary_ids(tokenizer)
    assert tokenizer.pieces([newline]) == ["\n"]
    tokens = torch.tensor([[*tokenizer.encode("a6+7=3\nA:3\n"), tokenizer.hf.eos_token_id]])
    steps = segment_steps(tokens, torch.ones_like(tokens, dtype=torch.bool), [newline])
    assert steps.tolist() == [[0] * 6 + [1] * 3 + [2]]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path=.*no tokenizer can be read"):
        Tokenizer(str(tmp_path))


def _changed(tiny_chain: Path, folder: Path, **changes: object) -> Path:
    """The embedded tokenizer with other top-level keys in tokenizer.json."""
    shutil.copytree(tiny_chain / "model", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    return folder


def _around(before: list[str], after: list[str]) -> dict[str, object]:
    """A post-processor that puts special tokens around a text."""
    pieces: list[dict[str, object]] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    pieces.append({"Sequence": {"id": "A", "type_id": 0}})
    pieces += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    known = {"<eos>": 1, "<unk>": 2}
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [known[token]], "tokens": [token]} for token in {*before, *after}
        },
    }


def test_a_closing_special_token_is_left_out_of_prompts(
    tiny_chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Tokenizer(str(tiny_chain / "model")).encode("6a+7")
    tokenizer = Tokenizer(str(_changed(tiny_chain, tmp_path / "m", post_processor=_around([], ["<eos>"]))))
    assert tokenizer.hf.encode("6a+7")[-1] == tokenizer.hf.eos_token_id
    assert tokenizer.encode("6a+7") == plain
    assert "appends <eos> to a text; it is left out of prompts" in caplog.text


def test_one_beginning_of_sequence(tiny_chain: Path, tmp_path: Path) -> None:
    """<unk> stands for it here."""
    tokenizer = Tokenizer(str(_changed(tiny_chain, tmp_path / "m", post_processor=_around(["<unk>"], ["<eos>"]))))
    plain = Tokenizer(str(tiny_chain / "model")).encode("6a+7")
    assert tokenizer.encode("6a+7") == [2, *plain]
    assert tokenizer.encode("<unk>6a+7") == [2, *plain]
    assert tokenizer.encode("6a+7", rendered=True) == plain


def test_a_class_that_splits_otherwise_is_refused(tiny_chain: Path, tmp_path: Path) -> None:
    """As transformers 5 does, which takes another class than the file's by names in other files."""
    import transformers

    folder = _changed(tiny_chain, tmp_path / "m")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"+": 36}
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "+"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="encodes .* tokenizer.json as .*; correct tokenizer_class .*model.verify=off"):
        tokenizer_module._compare_with_file(str(folder), loaded)
    tokenizer_module._compare_with_file(str(tiny_chain / "model"), loaded)


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}END{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("end", "stops", "message"),
    [
        ("<pad>", (0, 1), "closes a turn with '<pad>', now a stop token too"),
        ("<unk>", (1,), ""),
        ("<eos>", (1,), ""),
        ("d", (1,), "closes a turn with 'd', which is not a special token"),
        ("", (1,), ""),
    ],
)
def test_the_end_of_a_turn_is_a_stop_token(
    tiny_chain: Path, caplog: pytest.LogCaptureFixture, end: str, stops: tuple[int, ...], message: str
) -> None:
    template = TEMPLATE.replace("END", end)
    tokenizer = Tokenizer(str(tiny_chain / "model"), chat_template=template)
    assert tokenizer.stop_ids == stops
    assert message in caplog.text and bool(message) == ("closes a turn" in caplog.text)


def test_special_tokens_are_kept_where_it_is_asked_for(tiny_chain: Path) -> None:
    ids = [2, *Tokenizer(str(tiny_chain / "model")).encode("A:3"), 2, 1]
    assert Tokenizer(str(tiny_chain / "model")).decode(ids) == "A:3"
    assert Tokenizer(str(tiny_chain / "model"), keep_special_tokens=True).decode(ids) == "<unk>A:3<unk>"


@pytest.mark.parametrize(
    "template", ["const", "   ", "{{ 1 / 0 }}", "{% for m in messages %}{{ m.x.y }}{% endfor %}", "{{"]
)
def test_a_chat_template_that_shows_no_message_is_refused(tiny_chain: Path, template: str) -> None:
    with pytest.raises(UserError, match="model.chat_template"):
        Tokenizer(str(tiny_chain / "model"), chat_template=template)


@pytest.mark.parametrize("stops", ["1", ["1"], [None], [[1]], 1.5, {"a": 1}, -1, [1, -1], [1.5]])
def test_a_stop_token_is_a_number(tiny_chain: Path, tmp_path: Path, stops: object) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_chain / "model", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(UserError, match=r"generation_config.json .*(is not a token id|cannot be read)"):
        Tokenizer(str(folder))


def test_an_end_of_sequence_that_the_file_does_not_know_is_refused(tiny_chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_chain / "model", folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token": "<stop>"}))
    with pytest.raises(UserError, match="its eos_token '<stop>' is not in tokenizer.json"):
        Tokenizer(str(folder))
