"""Scores of an evaluation: pass@1, pass@k and maj@k, each with a 95 % interval by bootstrap over problems."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Score:
    """A mean over problems and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The score as a dictionary for JSON."""
        return asdict(self)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of ``k`` rollouts is correct, if ``correct`` of
    ``samples`` are: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, equation 1). Raises ValueError for k > samples."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples={samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


NO_VOTE = -1


def vote_pairs(answers: Sequence[str], correct: Sequence[bool]) -> list[tuple[int, int]]:
    """Pairs (later, earlier) of a problem's rollouts whose wrong answers differ as text, so that the verifier must
    decide whether they are equal. Each text is represented by its first rollout."""
    right = {answer for answer, ok in zip(answers, correct, strict=True) if ok}
    first = {answer: i for i, answer in reversed(list(enumerate(answers))) if answer and answer not in right}
    places = sorted(first.values())
    return [(later, earlier) for later in places for earlier in places if earlier < later]


def vote_classes(answers: Sequence[str], correct: Sequence[bool], equal: Collection[tuple[int, int]]) -> list[int]:
    """For each rollout of a problem the class of answers that it votes for; `NO_VOTE` for an empty answer. All correct
    answers are one class. ``equal``: the pairs of `vote_pairs` whose answers are equal."""
    same_as = dict(enumerate(range(len(answers))))
    for later, earlier in sorted(equal):
        same_as[later] = min(same_as[later], same_as[earlier])
    first: dict[str, int] = {}
    right = {answer for answer, ok in zip(answers, correct, strict=True) if ok}
    classes = []
    for i, (answer, ok) in enumerate(zip(answers, correct, strict=True)):
        if ok or (answer and answer in right):
            classes.append(len(answers))
        elif not answer:
            classes.append(NO_VOTE)
        else:
            classes.append(same_as[first.setdefault(answer, i)])
    return classes


def majority_correct(classes: Sequence[int], correct: Sequence[bool]) -> float:
    """1.0 if the class with most votes is correct, 0.0 if not; on a tie the mean over the tied classes. `NO_VOTE` does
    not count."""
    votes = Counter(each for each in classes if each != NO_VOTE)
    if not votes:
        return 0.0
    leaders = [each for each, count in votes.items() if count == max(votes.values())]
    right = [any(ok for own, ok in zip(classes, correct, strict=True) if own == each) for each in leaders]
    return sum(right) / len(right)


def bootstrap(values: Sequence[float], *, resamples: int, seed: int) -> Score:
    """The mean of ``values``, one for each problem, with its percentile interval over ``resamples`` draws of
    problems."""
    table = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(table), (resamples, len(table)), generator=generator)
    low, high = table[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(float(table.mean()), low, high)


def score_problems(
    correct: Sequence[Sequence[bool]], votes: Sequence[Sequence[int]], ks: Sequence[int], *, resamples: int, seed: int
) -> dict[str, Score]:
    """Scores over problems with the same number of rollouts each: `pass@1`, `pass@k` for each of ``ks``, and `maj@n`
    over all n rollouts. ``votes``: the `vote_classes` of each problem."""
    samples = len(correct[0])
    estimates: dict[str, Callable[[int], float]] = {"pass@1": lambda i: sum(correct[i]) / samples}
    for k in ks:
        if k > 1:
            estimates[f"pass@{k}"] = lambda i, k=k: pass_at_k(samples, sum(correct[i]), k)  # type: ignore[misc]
    if samples > 1:
        estimates[f"maj@{samples}"] = lambda i: majority_correct(votes[i], correct[i])
    return {
        name: bootstrap([estimate(i) for i in range(len(correct))], resamples=resamples, seed=seed)
        for name, estimate in estimates.items()
    }
