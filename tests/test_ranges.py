"""Every number of the configuration has a range, and what lies outside is refused."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.config import load_config
from echorl_nemo.config_reference import page
from echorl_nemo.errors import UserError
from echorl_nemo.ops.ranges import INTERVAL, Interval, check_fields, number
from echorl_nemo.schema import EvaluateConfig, RunConfig

NUMERIC_FIELDS = 105
"""Of RunConfig, EvaluateConfig and what stands in their lists and dictionaries; a new one is counted here."""
TRIED = ("nan", "inf", "-inf", "-1", "0", "1e20", "a_text", "[1,2]", "null")


@dataclass(frozen=True)
class Number:
    """A numeric field of the configuration."""

    key: str
    schema: type
    owner: type
    kinds: tuple[Any, ...]
    interval: Interval | None

    def override(self, value: str) -> str:
        """The field set to ``value``, as an override."""
        return {
            "data.extra_rewards.weight": f"data.extra_rewards=[{{name: a, weight: {value}}}]",
            "model.layouts.tensor": f"+model.layouts.8={{tensor: {value}}}",
            "model.layouts.pipeline": f"+model.layouts.8={{pipeline: {value}}}",
            "model.layouts.expert": f"+model.layouts.8={{expert: {value}}}",
        }.get(self.key, f"{self.key}={value}")


def _numbers(schema: type, section: Any, prefix: str = "") -> Iterator[Number]:
    for spec in fields(section):
        key = f"{prefix}{spec.name}"
        kinds = (spec.type, *get_args(spec.type))
        if is_dataclass(spec.type):
            yield from _numbers(schema, spec.type, f"{key}.")
        for inner in get_args(spec.type):
            if is_dataclass(inner):
                yield from _numbers(schema, inner, f"{key}.")
        if {int, float} & set(kinds) and not str(spec.type).startswith("dict"):
            yield Number(key, schema, section, kinds, spec.metadata.get(INTERVAL))


def _all_numbers() -> list[Number]:
    every = [*_numbers(RunConfig, RunConfig), *_numbers(EvaluateConfig, EvaluateConfig)]
    return list({(number.owner, number.key): number for number in reversed(every)}.values())[::-1]


NUMBERS = _all_numbers()


def test_every_number_has_a_range() -> None:
    assert len(NUMBERS) == NUMERIC_FIELDS
    assert [number.key for number in NUMBERS if number.interval is None] == []


def _is_allowed(number: Number, text: str) -> bool:
    """What the field's type and range say of ``text``, decided here by itself."""
    if text == "null":
        return type(None) in number.kinds
    if text == "[1,2]":
        return str(number.kinds[0]).startswith("list")
    if text == "a_text" or str(number.kinds[0]).startswith("list"):
        return False
    value = float(text)
    if not math.isfinite(value) or (int in number.kinds and text == "1e20"):
        return False
    assert number.interval is not None
    low, high = (float(bound) for bound in number.interval.text[1:-1].split(","))
    return (low < value or (low == value and number.interval.text[0] == "[")) and (
        value < high or (value == high and number.interval.text[-1] == "]")
    )


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.key)
def test_what_lies_outside_its_range_is_refused(number: Number) -> None:
    name = "quickstart" if number.schema is RunConfig else "evaluate"
    given = [] if number.schema is RunConfig else ["model.path=some/model", "data.eval=some/file.jsonl"]
    if number.key == "evaluation.samples":
        given.append("evaluation.k=[1]")
    for text in TRIED:
        overrides = [*given, number.override(text)]
        if _is_allowed(number, text):
            load_config(name, overrides, schema=number.schema)
            continue
        with pytest.raises(UserError) as caught:
            load_config(name, overrides, schema=number.schema)
        (message,) = str(caught.value).splitlines()
        assert message.replace("+", "").startswith(number.key.rpartition(".")[0]), message
        assert number.key.rpartition(".")[2] in message, message


def test_large_seeds_work() -> None:
    config = load_config("quickstart", ["trainer.seed=20261125222112"], schema=RunConfig)
    assert config.trainer.seed == 20261125222112


@given(
    low=st.integers(-5, 5), width=st.integers(1, 5), value=st.one_of(st.integers(-12, 12), st.floats()),
    left=st.sampled_from("[("), right=st.sampled_from("])"),
)  # fmt: skip
def test_an_interval_holds_what_lies_in_it(low: int, width: int, value: float, left: str, right: str) -> None:
    high = low + width
    inside = (low <= value if left == "[" else low < value) and (value <= high if right == "]" else value < high)
    assert (value in Interval(f"{left}{low}, {high}{right}")) == inside
    assert True not in Interval("[0, 1]") and "1" not in Interval("[0, 1]")


def test_every_problem_of_a_section_is_named() -> None:
    @dataclass
    class Section:
        one: int = number(1, "[1, 2]", "because")
        two: float | None = number(None, "(0, 1)")

    check_fields(Section(), "s")
    with pytest.raises(ValueError, match=r"^s.one=3 must lie in \[1, 2\]; because\ns.two=1.0 must lie in \(0, 1\)$"):
        check_fields(Section(3, 1.0), "s")


def test_the_documentation_of_keys_is_that_of_the_schema() -> None:
    path = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
    assert path.read_text() == page(), "make it again: python -m echorl_nemo.config_reference"
