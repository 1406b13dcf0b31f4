"""The tiny task: chain arithmetic modulo 10, solved line by line.

A prompt is a start digit and labelled operations, ``6a+7b+1c*3``. The response works one operation a line and
ends with the result::

    a6+7=3
    b3+1=4
    c4*3=2
    A:2

Each operation is one token, each line is one step of the EchoRL method. Demonstrations are wrong on purpose: every
fact (digit, operation) has a fixed corruption rate and one fixed wrong result, so that a model that imitates them
is uncertain at the hard facts and reinforcement learning has something to repair.
"""

import random
from dataclasses import dataclass

DIGITS = [str(digit) for digit in range(10)]
OPERATIONS = [f"+{n}" for n in range(1, 10)] + ["*3", "*7", "*9"]
LABELS = list("abcdefgh")
CORRUPTION_RATES = {0.01: 84, 0.15: 24, 0.50: 12}
"""Corruption rate of a fact -> number of the 120 facts that have it."""


@dataclass(frozen=True)
class Chain:
    """A start digit and the operations that follow; at most as many as there are labels."""

    start: int
    operations: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"{self.start}" + "".join(label + op for label, op in zip(LABELS, self.operations, strict=False))

    def solve(self, wrong: dict[tuple[int, str], int] | None = None) -> tuple[str, int]:
        """The worked response and its result; ``wrong`` overrides the value of single facts."""
        value, lines = self.start, []
        for label, op in zip(LABELS, self.operations, strict=False):
            result = (wrong or {}).get((value, op), apply(value, op))
            lines.append(f"{label}{value}{op}={result}\n")
            value = result
        return "".join(lines) + f"A:{value}\n", value


def apply(value: int, operation: str) -> int:
    operand = int(operation[1:])
    return (value + operand if operation[0] == "+" else value * operand) % 10


def random_chain(rng: random.Random, shortest: int, longest: int) -> Chain:
    length = rng.randint(shortest, longest)
    return Chain(rng.randrange(10), tuple(rng.choice(OPERATIONS) for _ in range(length)))


def add_filler(response: str, rng: random.Random) -> str:
    """``response`` with 0 to 4 lines of a random digit, ``=7``, before its answer: what they say does not matter, and
    when to stop them is the only choice."""
    head, answer = response.rsplit("A:", 1)
    return head + "".join(f"={rng.randrange(10)}\n" for _ in range(rng.randint(0, 4))) + "A:" + answer


class Corruption:
    """For every fact its corruption rate and its one wrong result, fixed by ``seed``."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        facts = [(digit, op) for digit in range(10) for op in OPERATIONS]
        rng.shuffle(facts)
        rates = [rate for rate, count in CORRUPTION_RATES.items() for _ in range(count)]
        self.rate = dict(zip(facts, rates, strict=True))
        self.wrong = {fact: rng.choice([d for d in range(10) if d != apply(*fact)]) for fact in facts}

    def demonstrate(self, chain: Chain, rng: random.Random) -> str:
        """One demonstration of ``chain``: each fact is wrong with its rate, and the chain goes on from there."""
        drawn = {fact: self.wrong[fact] for fact in self.rate if rng.random() < self.rate[fact]}
        return chain.solve(drawn)[0]
