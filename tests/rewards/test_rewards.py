import pytest

from echorl_nemo.errors import UserError
from echorl_nemo.rewards import exact_line, find_verifier


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("a6+7=3\nA:3\n", 1.0),
        ("A: 3", 1.0),
        ("A:3\n\n", 1.0),
        ("A:4\n", 0.0),
        ("A:3\nand more\n", 0.0),  # the line is not the final one
        ("a6+7=3\n", 0.0),
        ("A:33", 0.0),
        ("", 0.0),
    ],
)
def test_exact_line(response: str, reward: float) -> None:
    assert exact_line(response, "3") == reward


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"So the result is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"Hence \boxed{(3, 4)}", "(3,4)", 1.0),
        (r"We get $x = 7$, that is \boxed{7}.", "8", 0.0),
        ("no idea", "8", 0.0),
        ("", "8", 0.0),
    ],
)
def test_math(response: str, answer: str, reward: float) -> None:
    assert find_verifier("math")(response, answer) == reward


def test_a_verifier_of_ones_own() -> None:
    assert find_verifier("tests.rewards.verifiers:answers_length")("abc", "3") == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("judge", "reward 'judge' is not known; use exact_line, choice, math, or your own"),
        ("nowhere.at_all:x", "reward 'nowhere.at_all:x' cannot be imported: No module named 'nowhere'"),
        ("tests.rewards.verifiers:nothing", "cannot be imported: module .* has no attribute 'nothing'"),
        ("tests.rewards.verifiers:NUMBER", "is no function"),
    ],
)
def test_unknown_verifiers_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_verifier(name)
