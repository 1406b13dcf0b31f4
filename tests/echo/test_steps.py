import pytest
import torch
from hypothesis import given

from echorl_nemo.echo import boundary_ids, segment_steps
from tests import reference
from tests.echo.strategies import BOUNDARIES, Batch, batches


@given(batches())
def test_steps_equal_the_reference(batch: Batch) -> None:
    steps = segment_steps(batch.tokens, batch.response_mask, BOUNDARIES)
    for row in range(len(batch.tokens)):
        expected = reference.steps_of(batch.tokens[row].tolist(), batch.response_mask[row].tolist(), set(BOUNDARIES))
        assert steps[row].tolist() == expected


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ([5, 5, 5], [0, 0, 0]),  # no boundary: one step
        ([5, 1, 2, 5], [0, 0, 0, 1]),  # a run of boundaries ends one step
        ([1, 5, 1], [0, 1, 1]),  # boundary first and last
        ([1, 1], [0, 0]),  # nothing but boundaries
        ([5, 1, 0], [0, 0, 1]),  # what follows the last boundary, EOS included, is the last step
    ],
)
def test_definition_by_example(response: list[int], steps: list[int]) -> None:
    tokens = torch.tensor([[1, *response]])  # a boundary in the prompt ends nothing
    mask = torch.tensor([[False] + [True] * len(response)])
    assert segment_steps(tokens, mask, BOUNDARIES).tolist() == [[-1, *steps]]


class Vocabulary:
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, sequences: list[list[int]], **kwargs: object) -> list[str]:
        return ["".join(self.texts[i] for i in ids) for ids in sequences]


def test_newline_rule_takes_every_entry_that_holds_one() -> None:
    assert boundary_ids(Vocabulary("a", "\n", ".\n\n", " ", "\nb")) == (1, 2, 4)


def test_explicit_ids_are_taken_as_they_are() -> None:
    assert boundary_ids(Vocabulary("a", "b", "c"), [2, 0, 2]) == (0, 2)


def test_bad_boundaries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 vocabulary entries.*list of token ids"):
        boundary_ids(Vocabulary("a", "b"))
    with pytest.raises(ValueError, match=r"ids \[7\] are outside the vocabulary of 2"):
        boundary_ids(Vocabulary("a", "b"), [7])
    with pytest.raises(ValueError, match="'sentence' is not known"):
        boundary_ids(Vocabulary("a", "b"), "sentence")
