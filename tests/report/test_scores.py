import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.report.scores import (
    bootstrap,
    majority_correct,
    pass_at_k,
    score_problems,
    vote_classes,
    vote_pairs,
)
from echorl_nemo.rewards.final import final_answer


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(samples: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pass@5 needs 1 <= k <= samples=4"):
        pass_at_k(4, 1, 5)


def votes(answers: list[str], correct: list[bool], *equal: tuple[int, int]) -> float:
    return majority_correct(vote_classes(answers, correct, set(equal)), correct)


def test_majorities() -> None:
    assert votes(["3", "3", "4"], [True, True, False]) == 1.0
    assert votes(["3", "4", "4"], [True, False, False]) == 0.0
    assert votes(["3", "4"], [True, False]) == 0.5
    assert votes(["", "", "4"], [False, False, True]) == 1.0
    assert votes(["", ""], [False, False]) == 0.0


def test_votes_are_grouped_by_equality() -> None:
    right = [True, True, True, False, False]
    assert votes([r"\frac{1}{2}", "0.5", "1/2", "3", "3"], right) == 1.0
    wrong = ["1", "0.25", "1/4", "1", "25%"]
    correct = [True, False, False, True, False]
    assert vote_pairs(wrong, correct) == [(2, 1), (4, 1), (4, 2)]
    assert votes(wrong, correct) == 1.0
    assert votes(wrong, correct, (2, 1), (4, 2)) == 0.0
    assert vote_pairs(["1", "1", ""], [True, False, False]) == []


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("a6+7=3\nA:3\n", "3"),
        ("The answer: 4 apples.", "4apples"),
        ("Answer: $x + 1$", "x+1"),
        ("no idea", ""),
        ("The answer is 5.", "5"),
        ("so 2 + 3 = 5\n#### 5", "5"),
        (r"\boxed{\frac{\sqrt{\frac{x_{1}}{2}}}{2}}", r"\frac{\sqrt{\frac{x_{1}}{2}}}{2}"),
        (r"\fbox{7}", "7"),
        ("**Answer:** 12", "12"),
        ("Answer:\n\n8", "8"),
        (r"\boxed{2", ""),
    ],
)
def test_final_answers(response: str, answer: str) -> None:
    assert final_answer(response) == answer


def test_the_interval_covers_its_mean_and_shrinks_like_the_standard_error() -> None:
    values = [float(i % 4 == 0) for i in range(400)]
    score = bootstrap(values, resamples=2000, seed=0)
    assert score.value == 0.25
    error = math.sqrt(0.25 * 0.75 / 400)
    assert score.low == pytest.approx(0.25 - 1.96 * error, abs=0.006)
    assert score.high == pytest.approx(0.25 + 1.96 * error, abs=0.006)
    assert bootstrap(values, resamples=2000, seed=0) == score


def test_scores_of_problems_with_known_correctness() -> None:
    correct = [[True] * 4, [True, False, False, False], [False] * 4]
    answers = [["1"] * 4, ["2", "3", "3", "4"], ["5"] * 4]
    classes = [vote_classes(given, right, ()) for given, right in zip(answers, correct, strict=True)]
    scores = score_problems(correct, classes, [1, 2, 4], resamples=100, seed=0)
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {"pass@1": (1 + 0.25) / 3, "pass@2": (1 + 0.5) / 3, "pass@4": 2 / 3, "maj@4": 1 / 3}, abs=1e-12
    )
