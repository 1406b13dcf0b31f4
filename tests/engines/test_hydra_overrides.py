"""What is written as an override is read back as it was."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from echorl_nemo.engines.hydra_overrides import override

TEXT = st.text(st.characters(exclude_characters="\n\r\x00", exclude_categories=["Cs"]), max_size=20) | st.text(
    "\\\"'{}[],=: $", max_size=8
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT


@given(
    PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.sampled_from(["data_path", "a", "b1"]), PLAIN, max_size=3)
)
def test_round_trip(value: object) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override("a.b", value, add=True)])
    assert parsed.key_or_group == "a.b" and parsed.is_force_add()
    assert _plain(parsed.value()) == value


def _plain(value: object) -> object:
    """Hydra keeps quoted strings as objects that know their quotes."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value
