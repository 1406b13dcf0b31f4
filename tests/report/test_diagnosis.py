import pytest

from echorl_nemo.report.diagnosis import WINDOW, changed_settings, step_warnings, stop_bias_warning


def history(steps: int, *, growth: float, coverage: float | None) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(steps):
        rows.append({"response_length": 100 * (1 + growth * step / steps)})
        if coverage is not None:
            rows[-1]["echorl.stop_coverage"] = coverage
    return rows


def test_growing_responses_with_clips_that_do_not_stop_are_reported() -> None:
    warning = stop_bias_warning(history(30, growth=1.0, coverage=0.05))
    assert "from 115 to 182 tokens while 5% of the EchoClips" in warning and "echorl.span=full" in warning


def test_predictable_selections_are_not_suspected() -> None:
    rows = history(30, growth=1.0, coverage=0.05)
    assert "echorl=fork_tokens" in stop_bias_warning([{**row, "echorl.predictable": 0.0} for row in rows])
    assert stop_bias_warning([{**row, "echorl.predictable": 1.0} for row in rows]) == ""


@pytest.mark.parametrize(
    ("steps", "growth", "coverage"),
    [(30, 0.1, 0.05), (30, 1.0, 0.5), (30, 1.0, None), (10, 9.0, 0.05), (31, 1.0, 0.05), (30, -0.5, 0.05)],
)
def test_silence_otherwise(steps: int, growth: float, coverage: float | None) -> None:
    assert stop_bias_warning(history(steps, growth=growth, coverage=coverage)) == ""


def test_settings_that_changed_between_attempts_are_reported() -> None:
    before, after = "trainer:\n  lr: 1.0\n  seed: 0\n", "trainer:\n  lr: 2.0\n  seed: 0\nengine: megatron\n"
    assert changed_settings(before, after) == ["engine=None became megatron", "trainer.lr=1.0 became 2.0"]
    assert changed_settings(after, after) == []


SOUND = {"truncated": 0.1, "echorl.clips": 3.0, "echorl.unsegmented": 0.2}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("truncated", 0.95, "no stop token was sampled; raise rollout.max_new_tokens"),
        ("echorl.clips", 0.0, "no EchoClip was found"),
        ("echorl.unsegmented", 1.0, "the clip is the whole response; choose echorl.boundary"),
    ],
)
def test_a_condition_is_warned_of_when_it_appears_and_while_it_stays(name: str, value: float, words: str) -> None:
    rows = [SOUND, *[{**SOUND, name: value}] * (2 * WINDOW)]
    warned = [n for n in range(1, len(rows) + 1) if any(words in warning for warning in step_warnings(rows[:n]))]
    assert warned == [2, WINDOW, 2 * WINDOW]
    assert step_warnings([SOUND]) == step_warnings([{}]) == []


def test_a_damaged_configuration_is_reported() -> None:
    for before in (b"\xff", "a: [", "5"):
        assert changed_settings(before, "a: 1\n") == [
            "the configuration of the last attempt cannot be read, so that changes are not known"
        ]


def test_clips_without_weights_are_no_lack_of_successes() -> None:
    (warning,) = step_warnings([{**SOUND, "echorl.clips": 0.0, "echorl.eligible": 7.0}])
    assert warning.startswith("no EchoClip was found: 7 rollouts are verified successes, and echorl.span gave no token")
