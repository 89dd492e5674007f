"""Data files -> rows: .json, .jsonl, either gzipped, and .parquet; and which files of a folder make which split.

Serves `sources.py`. Rows keep the order of the file and, for several files, of their names. JSON lines are read one by
one, so that a broken one is named by its row.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dpo.errors import UserError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Group a folder's data files by the split that their names tell; those that tell none are "train".

    Args:
        folder: An existing folder; it and its direct subfolders are looked at.
    Returns:
        The files of every split, sorted by name; at least one.
    Raises:
        UserError: There is no data file.
    """
    found = [file for pattern in ("*", "*/*") for file in sorted(folder.glob(pattern))]
    files = [file for file in found if file.name.endswith(FILE_SUFFIXES) and file.is_file() and file.name[0] != "."]
    if not files:
        raise UserError(f"data '{folder}': a folder without data; it should hold {', '.join(FILE_SUFFIXES)} files")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_name(file.relative_to(folder)), []).append(file)
    return groups


def _split_name(file: Path) -> str:
    shard = re.match(r"(.+?)-\d+-of-\d+", file.name)
    if shard:
        return shard.group(1)
    words = re.findall("[a-z]+", str(file).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")


def read_files(files: list[Path], limit: int | None) -> list[Any] | pyarrow.Table:
    """Read the first `limit` rows (None: all) of some files, one after the other.

    Returns:
        A table if all files are parquet, else a list of mappings.
    Raises:
        UserError: A file is empty, damaged, or holds something other than rows.
    """
    if all(file.name.endswith(".parquet") for file in files):
        return _read_parquet(files, limit)
    rows: list[Any] = []
    for file in files:
        left = None if limit is None else limit - len(rows)
        if left == 0:
            break
        rows += _read_parquet([file], left).to_pylist() if file.name.endswith(".parquet") else _read_json(file, left)
    return rows


def _read_parquet(files: list[Path], limit: int | None) -> pyarrow.Table:
    tables = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable parquet file: {first_line(error)}") from error
    table = pyarrow.concat_tables(tables, promote_options="default")
    return table if limit is None else table.slice(0, limit)


def _read_json(file: Path, limit: int | None) -> list[Any]:
    """Read JSON lines or one JSON list, whichever the file holds."""
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            lines = (line for line in stream if line.strip(b" \t\r\n\xef\xbb\xbf"))
            first = next(lines, None)
            if first is None:
                raise UserError(f"{file}: the file is empty")
            first = first.removeprefix(b"\xef\xbb\xbf")
            if first.lstrip().startswith(b"["):
                return _parse_list(file, first + stream.read(), limit)
            return _parse_lines(file, first, lines, limit)
    except (OSError, EOFError, zlib.error) as error:
        what = "not a whole gzip file" if file.name.endswith(".gz") else "cannot be read"
        raise UserError(f"{file}: {what}: {first_line(error)}") from error


def _parse_lines(file: Path, first: bytes, rest: Iterable[bytes], limit: int | None) -> list[Any]:
    def lines() -> Iterator[bytes]:
        yield first
        yield from rest

    rows = []
    for number, line in enumerate(islice(lines(), limit), start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{file} row {number}: not UTF-8 text: {error}") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file} row {number}: not valid JSON: {first_line(error)}") from error
        rows.append(_checked(file, number, row))
    return rows


def _parse_list(file: Path, content: bytes, limit: int | None) -> list[Any]:
    try:
        rows = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {first_line(error)}") from error
    return [_checked(file, number, row) for number, row in enumerate(rows[:limit], start=1)]


def _checked(file: Path, number: int, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{file} row {number}: must be a JSON object with a key per column, got {type(row).__name__}")
    return row


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
