import subprocess
import sys
import time

import psutil
import pytest

from echorl_nemo.rewards import Verdict, VerifierPool

MISBEHAVE = "tests.rewards.verifiers:misbehave"


def test_failures_are_verdicts_and_the_others_are_not_touched() -> None:
    pool = VerifierPool([MISBEHAVE], workers=2, timeout_seconds=3.0)
    responses = ["fine", "hang", "fine", "crash", "raise", "string", "nan", "print", "fine"]
    start = time.monotonic()
    verdicts = pool.score([(response, "right") for response in responses])[MISBEHAVE]
    assert time.monotonic() - start < 60
    pool.close()
    assert [verdict.failure for verdict in verdicts] == [
        "", "timed out after 3.0 s", "", "crashed with exit code 3", "raised KeyError: 'lost'",
        "raised TypeError: returned '1.0', not a finite number", "raised TypeError: returned nan, not a finite number",
        "", "",
    ]  # fmt: skip
    assert [verdict.reward for verdict in verdicts] == [0.0 if verdict.failure else 1.0 for verdict in verdicts]


def test_a_verifier_that_forks_answers_once() -> None:
    pool = VerifierPool([MISBEHAVE], workers=1, timeout_seconds=10.0)
    verdicts = pool.score([("fork", "right")] * 3 + [("fine", "right")])[MISBEHAVE]
    assert verdicts == [Verdict(1.0)] * 4
    copies = [grandchild for child in psutil.Process().children() for grandchild in child.children()]
    deadline = time.monotonic() + 60
    while any(copy.is_running() and copy.status() != psutil.STATUS_ZOMBIE for copy in copies):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pool.close()


def test_several_verifiers_keep_their_order() -> None:
    pool = VerifierPool(["math", "exact_line"], workers=1, timeout_seconds=30.0)
    verdicts = pool.score([(r"\boxed{0.5}", "1/2"), ("A:1/2", "1/2"), ("A:3", "4")])
    pool.close()
    assert list(verdicts) == ["math", "exact_line"]
    assert [verdict.reward for verdict in verdicts["exact_line"]] == [0.0, 1.0, 0.0]
    assert verdicts["math"][0] == Verdict(1.0) and verdicts["math"][2].reward == 0.0


def test_what_a_verifier_prints_is_no_output(tmp_path: object) -> None:
    code = (
        "from echorl_nemo.rewards import VerifierPool\n"
        "if __name__ == '__main__':\n"
        f"    pool = VerifierPool(['{MISBEHAVE}'], workers=1, timeout_seconds=30.0)\n"
        f"    print(pool.score([('print', 'right')])['{MISBEHAVE}'][0].reward)\n"
        "    pool.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "1.0\n" and "a verifier speaks" in done.stderr


def test_instant_verifiers_start_no_process() -> None:
    pool = VerifierPool(["exact_line"], workers=2, timeout_seconds=1.0)
    assert pool.score([("A:3", "3")]) == {"exact_line": [Verdict(1.0)]}
    assert pool._pool is None
    pool.close()


@pytest.mark.parametrize("count", [0])
def test_no_pairs(count: int) -> None:
    assert VerifierPool(["math"], workers=1, timeout_seconds=1.0).score([]) == {"math": []}


def test_numbers_of_numpy_and_torch_are_rewards_and_a_huge_one_is_none() -> None:
    name = "tests.rewards.verifiers:numpy_numbers"
    pool = VerifierPool([name], workers=1, timeout_seconds=60.0)
    verdicts = pool.score([(kind, "") for kind in ("float32", "bool", "tensor", "huge")])[name]
    pool.close()
    assert verdicts[:3] == [Verdict(1.0)] * 3
    assert verdicts[3].failure == "raised ValueError: returned 1e+300; rewards must lie in [-1e+06, 1e+06]"


def test_a_verifier_gets_its_row() -> None:
    name = "tests.rewards.verifiers:asks_the_row"
    pool = VerifierPool([name, "exact_line"], workers=1, timeout_seconds=60.0)
    rows = [{"answer": "3", "tests": ["assert f(1) == 2"]}, {"answer": "4", "tests": []}]
    verdicts = pool.score([("3", "3"), ("4", "4")], rows)
    pool.close()
    assert [verdict.reward for verdict in verdicts[name]] == [1.0, 0.0]


@pytest.mark.parametrize("response", ["fine", "hang"])
def test_what_a_verifier_starts_ends_with_the_pool(response: str) -> None:
    name = "tests.rewards.verifiers:forks"
    pool = VerifierPool([name], workers=1, timeout_seconds=1.0)
    pool.score([(response, "")])
    pool.close()
    left = [child for child in psutil.Process().children(recursive=True) if child.name() == "sleep"]
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def test_whatever_a_verifier_raises_is_a_verdict() -> None:
    """Exits, interrupts, exceptions that cannot be unpickled, text that no file takes; the next call is answered."""
    name = "tests.rewards.verifiers:raises_oddly"
    kinds = ["exit", "interrupt", "two", "surrogate", "array", "complex", "fine"]
    pool = VerifierPool([name], workers=1, timeout_seconds=60.0)
    for _ in range(2):
        verdicts = pool.score([(kind, "") for kind in kinds])[name]
        assert [verdict.reward for verdict in verdicts] == [0.0] * 6 + [1.0]
        assert [verdict.failure.split(":")[0] for verdict in verdicts] == [
            "raised SystemExit", "raised KeyboardInterrupt", "raised _NeedsTwoError", "raised ValueError",
            "raised ValueError", "raised TypeError", "",
        ]  # fmt: skip
        assert all(len(verdict.failure.encode()) < 2100 for verdict in verdicts)
    pool.close()
