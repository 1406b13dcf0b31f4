"""Reads the rows of a data source: JSONL, CSV, parquet, a folder that `datasets` saved, or a hub dataset."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from echorl_nemo.errors import UserError, first_line

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TABLES = {".csv": ",", ".tsv": "\t"}
"""Separator of a table, by file suffix. The values of a table are read as text."""
FILE_SUFFIXES = {".jsonl", ".json", ".parquet", *TABLES}

Rows = Iterator[tuple[str, dict[str, Any] | UserError]]
"""Pairs ("source:row number", row); a bad row is a UserError that is yielded, not raised. Rows count from 1."""


SHOWN_ROWS = 20
"""Number of bad rows that an error lists; the others are only counted."""


def raise_bad_rows(problems: Sequence[str]) -> None:
    """Raises UserError with the first `SHOWN_ROWS` of ``problems``, one for each bad row, if there are any."""
    if problems:
        further = [f"and {len(problems) - SHOWN_ROWS} further rows"] if len(problems) > SHOWN_ROWS else []
        raise UserError("\n".join([*problems[:SHOWN_ROWS], *further]))


def read_rows(source: str, *, subset: str | None, split: str, field: str) -> Rows:
    """Iterate over the rows of ``source``: a .jsonl, .csv, .tsv or .parquet file, a folder that `datasets` saved, or
    the ``split`` and ``subset`` of a hub dataset.

    ``field``: the configuration key, for error messages. Raises UserError if the source cannot be read at all.
    """
    path = Path(source)
    if path.suffix in FILE_SUFFIXES and not path.is_file():
        raise UserError(f"{field}={source}: there is no such file; correct the path")
    if not source.strip():
        raise UserError(f"{field}={source!r} is empty; name a file, a folder, or a hub dataset")
    if path.suffix in (".jsonl", ".json"):
        return read_jsonl(path)
    if path.suffix in TABLES:
        return read_table(path, TABLES[path.suffix])
    return _read_dataset(source, path, subset, split, field)


def read_jsonl(path: Path) -> Rows:
    """Iterate over the objects of a JSONL file, without blank lines. For a bad line a UserError is yielded, not
    raised."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parse_line(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_table(path: Path, separator: str) -> Rows:
    """Iterate over the rows of a table with a header line. For a row whose number of values differs from the header's a
    UserError is yielded, not raised."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter=separator, strict=True), 1):
                where = f"{path}:{number}"
                if None in row or None in row.values():
                    yield (
                        where,
                        UserError(f"{where}: the row and the header have different numbers of values; correct it"),
                    )
                else:
                    yield where, dict(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); correct it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_line(line: bytes, where: str) -> dict[str, Any] | UserError:
    try:
        row = json.loads(line.decode("utf-8-sig" if where.endswith(":1") else "utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or a number with thousands of digits
        return UserError(f"{where}: not JSON in UTF-8 ({error}); each line must be one JSON object")
    if not isinstance(row, dict):
        return UserError(f'{where}: a JSON {type(row).__name__}, not an object like {{"prompt": ...}}')
    return row


def _read_dataset(source: str, path: Path, subset: str | None, split: str, field: str) -> Rows:
    import datasets  # slow to import, and not needed for JSONL

    try:
        if path.suffix == ".parquet":
            data = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif path.is_dir() and (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(str(path))[split]
        elif path.is_dir() and (path / "state.json").is_file():
            data = datasets.load_from_disk(str(path))
        elif path.is_dir() or HUB_ID.fullmatch(source):
            data = datasets.load_dataset(source, subset, split=split)
        else:
            raise UserError(f"{field}={source}: there is no such file, folder or hub dataset; correct the name")
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        innermost: BaseException = error
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        cause = first_line(innermost) or type(innermost).__name__
        raise UserError(f"{field}={source} (subset {subset}, split {split}): {cause}") from error
    for number, row in enumerate(data, 1):
        yield f"{source}:{number}", dict(row)
