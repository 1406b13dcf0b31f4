import pytest

from echorl_nemo.errors import UserError
from echorl_nemo.rewards import exact_line, math_equal, reward_by_name


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
def test_math_equal(response: str, answer: str, reward: float) -> None:
    assert math_equal(response, answer) == reward


def test_unknown_reward_is_refused() -> None:
    with pytest.raises(UserError, match="data.reward='judge' is not known; use one of exact_line, math"):
        reward_by_name("judge")
