"""Texts of the repository use plain words: neither private metaphors nor words that need a second guess."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TEXTS = {".py", ".md", ".sh", ".sbatch", ".yaml", ".html", ".cfg", ".toml", ".txt", ".cff", ""}
"""Suffixes of files with prose; files without a suffix are Makefile, Dockerfile and the like."""
SHIPPED_AS_IS = ("LICENSE", "examples/tiny_chain/made", "docs/images", "tests/test_words.py")

WORDS = {
    r"told|tells?|tellers?": "say who does what: `is reported`, `prints`, `shows`",
    r"mend(s|ed|ing)?": "`correct` or `fix`",
    r"alone": "`only`, before the word that it restricts",
    r"anew": "`again`",
    r"rooms|the dead|thinner products?|my share": "say what is meant",
    r"beats?": "`heartbeat`, or say what is written",
    r"settl(e|es|ed|ing)": "`resolve`, for sizes and layouts",
    r"whose like|goes along|go along": "say what happens",
    r"(?<!there )(is|are|was|were) no (value|text|number|key|letter|folder|file|function|list|word|token)s?": (
        "`is not a ...`"
    ),
}
"""Expressions, matched as whole words in any case, and what to write instead."""


def findings(text: str) -> list[str]:
    """A line about each listed word in ``text``: line number, the word, what to write instead."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in WORDS.items():
            if match := re.search(rf"(?<![\w`])(?:{pattern})(?![\w`])", line, re.IGNORECASE):
                found.append(f"{number}: {match[0]!r}; write {instead}")
    return found


def texts() -> list[str]:
    """The tracked files with prose."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [name for name in listed if Path(name).suffix in TEXTS and not name.startswith(SHIPPED_AS_IS)]


def test_every_text_is_in_plain_words() -> None:
    found = [
        f"{name}:{finding}"
        for name in texts()
        if (REPOSITORY / name).is_file()
        for finding in findings((REPOSITORY / name).read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "planted",
    [
        "What is wrong is told once.", "The cause is mended.", "It runs on the main rank alone.", "Start it anew.",
        "x is no text", "These are no numbers", "The layout is settled.", "as they pass through the rooms",
    ],
)  # fmt: skip
def test_a_planted_word_is_found(planted: str) -> None:
    assert len(findings(f"fine\n{planted}")) == 1 and findings(planted)[0].startswith("1: ")


def test_words_that_only_contain_a_listed_one_pass() -> None:
    assert findings("standalone recommended untold heartbeat `alone` there is no file; it is no longer there") == []
