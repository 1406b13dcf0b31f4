"""The example of a selection of one's own, and the picture of docs/method.md."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echorl_nemo.schema import RunConfig
from tests.engines.megatron.helpers import tiny_config, trainer_of

REPOSITORY = Path(__file__).resolve().parents[2]


def _train(config: RunConfig) -> list[dict[str, float]]:
    trainer = trainer_of(config)
    return [trainer.step().metrics for _ in range(2)]


def test_a_selection_of_ones_own_trains(ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    (own,) = ranks(1, _train, tiny_config("echorl.span=own_selection:early_forks"))
    (clips,) = ranks(1, _train, tiny_config())
    assert own[0]["echorl.clip_tokens"] == clips[0]["echorl.clip_tokens"] > 0
    assert own[0]["clip_loss"] != clips[0]["clip_loss"] and own[0]["echorl.predictable"] == 0


def test_the_page_shows_the_example() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "method.md").read_text(), flags=re.DOTALL)
    assert (REPOSITORY / "examples" / "own_selection.py").read_text().endswith(shown)
    assert len(shown.splitlines()) < 20


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    script = str(REPOSITORY / "examples" / "draw_selections.py")
    subprocess.run([sys.executable, script, "--out", str(tmp_path / "out.png")], check=True)
    assert (tmp_path / "out.png").stat().st_size > 10_000
