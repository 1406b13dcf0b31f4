import pytest

from echorl_nemo.report.diagnosis import changed_settings, stop_bias_warning


def history(steps: int, *, growth: float, coverage: float | None) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(steps):
        rows.append({"response_length": 100 * (1 + growth * step / steps)})
        if coverage is not None:
            rows[-1]["echorl.stop_coverage"] = coverage
    return rows


def test_growing_responses_with_clips_that_do_not_stop_are_told() -> None:
    warning = stop_bias_warning(history(30, growth=1.0, coverage=0.05))
    assert "from 115 to 182 tokens while 5% of the EchoClips" in warning and "echorl.span=full" in warning


@pytest.mark.parametrize(
    ("steps", "growth", "coverage"),
    [(30, 0.1, 0.05), (30, 1.0, 0.5), (30, 1.0, None), (10, 9.0, 0.05), (31, 1.0, 0.05), (30, -0.5, 0.05)],
)
def test_silence_otherwise(steps: int, growth: float, coverage: float | None) -> None:
    assert stop_bias_warning(history(steps, growth=growth, coverage=coverage)) == ""


def test_settings_that_changed_between_attempts_are_told() -> None:
    before, after = "trainer:\n  lr: 1.0\n  seed: 0\n", "trainer:\n  lr: 2.0\n  seed: 0\nengine: megatron\n"
    assert changed_settings(before, after) == ["engine=None became megatron", "trainer.lr=1.0 became 2.0"]
    assert changed_settings(after, after) == []
