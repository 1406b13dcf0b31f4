"""Rows of a data source: JSONL, parquet, a saved dataset's folder, or a hub dataset."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echorl_nemo.errors import UserError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE_SUFFIXES = {".jsonl", ".json", ".parquet"}

Rows = Iterator[tuple[str, dict[str, Any]]]
"""("where:row", row); rows count from 1."""


def read_rows(source: str, *, subset: str | None, split: str, field: str) -> Rows:
    """The rows of ``source``: a .jsonl or .parquet file, a folder that `datasets` saved, or the id of a hub dataset, of
    which ``subset`` and ``split`` are taken.

    ``field`` names the config key in errors. Raises UserError for what cannot be read.
    """
    path = Path(source)
    if path.suffix in FILE_SUFFIXES and not path.is_file():
        raise UserError(f"{field}={source}: no such file")
    if path.suffix in (".jsonl", ".json"):
        return read_jsonl(path)
    return _read_dataset(source, path, subset, split, field)


def read_jsonl(path: Path) -> Rows:
    """The objects of a JSONL file, blank lines left out. Raises UserError naming the line that is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not JSON in UTF-8 ({error}); each line must be one JSON object") from error
            if not isinstance(row, dict):
                raise UserError(f'{where}: a JSON {type(row).__name__}, not an object like {{"prompt": ...}}')
            yield where, row


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
            raise UserError(f"{field}={source}: no such file, folder or hub dataset")
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{field}={source} (subset {subset}, split {split}): {str(error).splitlines()[0]}") from error
    for number, row in enumerate(data, 1):
        yield f"{source}:{number}", dict(row)
