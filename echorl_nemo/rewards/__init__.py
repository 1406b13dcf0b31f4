"""Verifiers, which give a response its reward by its reference answer: 1.0 for a verified success."""

from echorl_nemo.rewards.exact import exact_line
from echorl_nemo.rewards.pool import TIMED_OUT, Verdict, VerifierPool
from echorl_nemo.rewards.verifiers import Verifier, find_verifier, reference_problem, takes_row

__all__ = [
    "TIMED_OUT", "Verdict", "Verifier", "VerifierPool", "exact_line", "find_verifier", "reference_problem", "takes_row",
]  # fmt: skip
