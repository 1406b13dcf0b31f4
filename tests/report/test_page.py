import json
import re
from pathlib import Path
from typing import Any

from echorl_nemo.report.page import write_report

RECORD: dict[str, Any] = {
    "step": 0,
    "group": 7,
    "prompt": "<b>6a+7</b>",
    "answer": "3",
    "reward": 1.0,
    "advantage": 0.0,
    "finished": True,
    "tokens": ["a", "<script>", "\n", "A:", "3"],
    "entropies": [0.0, 0.3, 0.0, 1.5, 9.0],
    "steps": [0, 0, 0, 1, 1],
    "clip": [1, 1, 1, 0, 0],
}


def page(folder: Path, *records: dict[str, Any]) -> str:
    rows = [{"step": -1, "eval.accuracy": 0.5}, {"step": 0, "reward": 0.5, "all_one": 0.25, "all_zero": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report(folder, folder / "report.html")
    return (folder / "report.html").read_text()


def test_tokens_are_shaded_and_the_clip_is_underlined(tmp_path: Path) -> None:
    tokens = re.findall(
        r'<span class="(token[ clip]*)" style="--shade:([\d.]+)" title="([\d.]+ nats)">(.*?)</span>',
        page(tmp_path, RECORD),
    )
    assert [text for *_, text in tokens] == ["a", "&lt;script&gt;", "⏎", "A:", "3"]
    assert [kind == "token clip" for kind, *_ in tokens] == [True, True, True, False, False]
    assert [float(shade) for _, shade, *_ in tokens] == [0.0, 0.2, 0.0, 1.0, 1.0]
    assert tokens[4][2] == "9.000 nats"


def test_rows_are_steps_and_the_peak_is_marked(tmp_path: Path) -> None:
    rows = re.findall(
        r'<div class="(step[ peak]*)">.*?<span class="mean">([\d.]+)</span></div>', page(tmp_path, RECORD), re.S
    )
    assert rows == [("step", "0.100"), ("step peak", "5.250")]


def test_text_of_rollouts_and_config_is_data(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("path: <img src=x>")
    html = page(tmp_path, RECORD)
    assert "<script" not in html and "<img" not in html and "<b>6a+7</b>" not in html
    assert "&lt;b&gt;6a+7&lt;/b&gt;" in html


def test_the_page_is_one_file_without_network(tmp_path: Path) -> None:
    html = page(tmp_path, RECORD)
    assert html.count("<svg") == 6
    assert not re.search(r'(src|href)="(?!#)', html)


def test_a_run_without_clips(tmp_path: Path) -> None:
    html = page(tmp_path, RECORD | {"clip": []})
    assert html.count('class="token"') == 6 and 'class="token clip"' not in html  # one of them in the explanation
