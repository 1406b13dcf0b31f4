"""Scores of an evaluation: pass@1, pass@k, maj@k, each with a 95 % interval by bootstrap over problems."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Score:
    """A mean over problems and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate that at least one of ``k`` rollouts is right, from ``correct`` of ``samples``:
    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, equation 1). Raises ValueError for k > samples."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples={samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_correct(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; on a tie the mean over those that tie. Empty answers do not vote."""
    votes: dict[str, int] = {}
    for answer in answers:
        if answer:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return 0.0
    leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
    right = [any(ok for own, ok in zip(answers, correct, strict=True) if own == answer) for answer in leaders]
    return sum(right) / len(right)


_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_MARKED = re.compile(r"(?:A|[Aa]nswer)\s*:\s*\$?([^\n$]+)")


def final_answer(response: str) -> str:
    """What votes for a response: its last boxed expression, else what follows its last `A:` or `Answer:`, spaces left
    out; empty if there is neither."""
    for pattern in (_BOXED, _MARKED):
        if found := pattern.findall(response):
            return "".join(found[-1].split()).rstrip(".")
    return ""


def bootstrap(values: Sequence[float], *, resamples: int, seed: int) -> Score:
    """The mean of ``values``, one a problem, and its percentile interval over ``resamples`` draws of problems."""
    table = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(table), (resamples, len(table)), generator=generator)
    low, high = table[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(float(table.mean()), low, high)


def score_problems(
    correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str]], ks: Sequence[int], *, resamples: int, seed: int
) -> dict[str, Score]:
    """Scores of problems, each with the same number of rollouts: `pass@1` (the mean of k), `pass@k` for each of ``ks``,
    and `maj@n` over all n rollouts."""
    samples = len(correct[0])
    estimates: dict[str, Callable[[int], float]] = {"pass@1": lambda i: sum(correct[i]) / samples}
    for k in ks:
        if k > 1:
            estimates[f"pass@{k}"] = lambda i, k=k: pass_at_k(samples, sum(correct[i]), k)  # type: ignore[misc]
    if samples > 1:
        estimates[f"maj@{samples}"] = lambda i: majority_correct(answers[i], correct[i])
    return {
        name: bootstrap([estimate(i) for i in range(len(correct))], resamples=resamples, seed=seed)
        for name, estimate in estimates.items()
    }
