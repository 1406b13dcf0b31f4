import json
import re
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.errors import UserError
from echorl_nemo.report.page import group_records, write_report

RECORD: dict[str, Any] = {
    "step": 0,
    "group": 7,
    "prompt": "<b>6a+7</b>",
    "answer": "3",
    "reward": 1.0,
    "reward_parts": {"math": 1.0},
    "advantage": 0.0,
    "finished": True,
    "tokens": ["a", "</script><script>alert(1)</script>", "\n", "A:", "3"],
    "entropies": [0.0, 0.3, 0.0, 1.5, 9.0],
    "steps": [0, 0, 0, 1, 1],
    "clip": [1, 1, 1, 0, 0],
}


def run_folder(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"step": -1, "eval.accuracy": 0.5}, {"step": 0, "reward": 0.5, "all_one": 0.25, "all_zero": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def page(folder: Path, *records: dict[str, Any]) -> str:
    write_report([run_folder(folder, *records)], folder / "report.html")
    return (folder / "report.html").read_text()


def data_of(html: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_groups_carry_their_rollouts_as_they_were_kept(tmp_path: Path) -> None:
    (group,) = data_of(page(tmp_path, RECORD, RECORD | {"reward": 0.0, "clip": []}))
    assert (group["pattern"], group["marks"], group["peak"]) == ("mixed", "1 of 2 right", 5.25)
    assert group["rollouts"][0] == RECORD
    assert group["rollouts"][1]["clip"] == [0] * 5


def test_reward_patterns() -> None:
    records = [
        RECORD | {"group": group, "reward": reward} for group, reward in ((1, 1), (1, 1), (2, 0), (3, 0), (3, 1))
    ]
    assert [group["pattern"] for group in group_records("run", records)] == ["all right", "all wrong", "mixed"]


def test_success_is_what_the_run_called_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("echorl:\n  success_reward: 0.5\n")
    groups = data_of(page(tmp_path, RECORD | {"reward": 0.5}, RECORD | {"group": 8, "reward": 0.4}))
    assert [group["pattern"] for group in groups] == ["all right", "all wrong"]


def test_text_of_rollouts_and_config_is_data(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("path: <img src=x>")
    html = page(tmp_path, RECORD)
    assert html.count("<script") == 2 and "alert(1)</script>" not in html and "<b>6a+7</b>" not in html
    assert "<img" not in html and "path: &lt;img src=x&gt;" in html
    assert data_of(html)[0]["rollouts"][0]["tokens"][1] == "</script><script>alert(1)</script>"


def test_the_page_is_one_file_without_network(tmp_path: Path) -> None:
    html = page(tmp_path, RECORD)
    assert html.count("<svg") == 8
    assert not re.search(r'(src|href)="(?!#)', html) and "@import" not in html and "fetch(" not in html


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, RECORD) for name in ("first", "second")]
    write_report(runs, tmp_path / "both.html")
    html = (tmp_path / "both.html").read_text()
    assert [group["run"] for group in data_of(html)] == ["first", "second"]
    assert "first: training rollouts" in html and "second: training rollouts" in html


def test_the_stop_bias_is_reported(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, RECORD)
    rows = [{"step": s, "reward": 1.0, "response_length": 10.0 + s, "echorl.stop_coverage": 0.0} for s in range(25)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([folder], tmp_path / "report.html")
    assert "Warning:</b> " in (html := (tmp_path / "report.html").read_text()) and "echorl.span=full" in html


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no metrics; name the folder of a run"):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.mark.parametrize(("reduction", "peak"), [("mean", 5.25), ("max", 9.0), ("sum", 10.5)])
def test_peaks_are_those_of_the_configured_reduction(tmp_path: Path, reduction: str, peak: float) -> None:
    (tmp_path / "config.yaml").write_text(f"echorl:\n  step_reduction: {reduction}\n")
    (group,) = data_of(page(tmp_path, RECORD))
    assert (group["reduction"], group["peak"]) == (reduction, peak)


def test_what_is_not_finite_in_kept_rollouts_is_null(tmp_path: Path) -> None:
    record = RECORD | {"entropies": [float("nan"), 0.3, float("inf"), 1.5, 9.0], "reward": float("nan")}
    html = page(tmp_path, record)
    assert "NaN" not in html.split('type="application/json">')[1].split("</script>")[0]
    assert data_of(html)[0]["rollouts"][0]["entropies"] == [None, 0.3, None, 1.5, 9.0]


def test_lasting_conditions_are_warned_of(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, RECORD)
    row = {"reward": 0.0, "response_length": 5.0, "truncated": 1.0, "echorl.clips": 0.0, "echorl.unsegmented": 0.95}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, **row}) + "\n" for n in range(3)))
    write_report([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    for words in (
        "100% of the rollouts were truncated",
        "no EchoClip was found",
        "95% of the responses have no boundary",
    ):
        assert words in html
