"""Data files -> rows: .json, .jsonl and .csv, each gzipped or not, and .parquet; and which files of a folder make which
split.

Serves `sources.py`. Rows keep the order of the file and, for several files, of their names. JSON lines are read one by
one, so that a broken one is named by its row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dpo.errors import UserError

TABLES = (".csv", ".csv.gz")
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", *TABLES, ".parquet")

DEEPEST = 50
"""Levels of lists and objects within a row; conversations with tools have about ten."""

_VOTES = re.compile(r"label|annotator\d+")
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
    files = [file for file in files if not file.name.endswith(TABLES)] or files  # beside data a table is notes on it
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
        if file.name.endswith(".parquet"):
            rows += _read_parquet([file], left).to_pylist()
        else:
            rows += islice(_text_rows(file), left)
    return rows


def stream_files(files: list[Path], limit: int | None) -> Iterator[Any]:
    """Yield the rows of some files, one after the other, holding a few of them at a time.

    A file that is one JSON list is held whole.

    Raises:
        UserError: As `read_files`, when the row is reached.
    """
    return islice(chain.from_iterable(_stream_file(file) for file in files), limit)


def _stream_file(file: Path) -> Iterator[Any]:
    if not file.name.endswith(".parquet"):
        yield from _text_rows(file)
        return
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {first_line(error)}; make it anew") from error


def _read_parquet(files: list[Path], limit: int | None) -> pyarrow.Table:
    tables = []
    for file in files:
        try:
            # Neither its folders' names nor what its metadata says of images and sounds by path makes a column.
            table = pyarrow.parquet.read_table(file, partitioning=None).replace_schema_metadata(None)
        except (pyarrow.ArrowException, OSError) as error:
            what = f"not a readable parquet file: {first_line(error)}; make it anew, or name another file"
            raise UserError(f"{file}: {what}") from error
        if len(set(table.column_names)) < len(table.column_names):
            raise UserError(f"{file}: a column is there twice among {', '.join(table.column_names)}; keep one")
        tables.append(table)
    try:
        table = pyarrow.concat_tables(tables, promote_options="default")
    except pyarrow.ArrowException as error:
        names = f"{files[0].parent}: {', '.join(file.name for file in files[:3])}"
        raise UserError(f"{names}: columns of different types: {first_line(error)}; give all files the same") from error
    return table if limit is None else table.slice(0, limit)


def _text_rows(file: Path) -> Iterator[Any]:
    """Yield the rows of CSV, of JSON lines or of one JSON list, the last two whichever the file holds."""
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            if file.name.endswith(TABLES):
                with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                    yield from _csv_rows(file, text)
                return
            lines = (line for line in stream if line.strip(b" \t\r\n\xef\xbb\xbf"))
            first = next(lines, None)
            if first is None:
                raise UserError(f"{file}: the file is empty; write a JSON object per line, or name another file")
            first = first.removeprefix(b"\xef\xbb\xbf")
            if first.lstrip().startswith(b"["):
                yield from _parse_list(file, first + stream.read())
            else:
                yield from _parse_lines(file, chain([first], lines))
    except (OSError, EOFError, zlib.error) as error:
        what = "not a whole gzip file" if file.name.endswith(".gz") else "cannot be read"
        raise UserError(f"{file}: {what}: {first_line(error)}; make it anew, or name another file") from error


def _csv_rows(file: Path, text: io.TextIOWrapper) -> Iterator[Any]:
    """Yield the rows of a table whose first line names the columns; texts are kept as they stand, votes are numbers."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text, strict=True)
    number = 0
    try:
        names = next(reader, [])
        if len(names) < 2 or len(set(names)) < len(names):
            named = ", ".join(names)
            raise UserError(f"{file}: its first line names the columns {named}; give at least two by commas, each once")
        for number, cells in enumerate(filter(None, reader), start=1):
            if len(cells) != len(names):
                raise UserError(f"{file} row {number}: {len(cells)} cells for {len(names)} columns; fix it")
            row = zip(names, cells, strict=True)
            yield {name: _vote(cell) if _VOTES.fullmatch(name) else cell for name, cell in row}
    except csv.Error as error:
        raise UserError(f"{file} row {number + 1}: not valid CSV: {error}; fix it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}; save it as UTF-8") from error


def _vote(cell: str) -> int | str | None:
    return int(cell) if cell.isdecimal() else cell or None


def _parse_lines(file: Path, lines: Iterable[bytes]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        try:
            row = _loads(line.strip())
        except UnicodeDecodeError as error:
            raise UserError(f"{file} row {number}: not UTF-8 text: {error}; save it as UTF-8") from error
        except (ValueError, RecursionError) as error:
            if number == 1 and line.strip() == b"{":
                what = "one JSON object over several lines; a list of rows, or one object a line, is needed"
                raise UserError(f"{file}: holds {what}") from error
            raise UserError(f"{file} row {number}: not valid JSON: {first_line(error)}; fix it") from error
        yield _checked(file, number, row)


def _parse_list(file: Path, content: bytes) -> Iterator[Any]:
    try:
        rows = _loads(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {first_line(error)}; fix it") from error
    for number, row in enumerate(rows, start=1):
        yield _checked(file, number, row)


def _checked(file: Path, number: int, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        got = f"got {type(row).__name__}; fix it"
        raise UserError(f"{file} row {number}: must be a JSON object with a key per column, {got}")
    return row


def _loads(text: bytes) -> Any:
    """Parse JSON; a key given twice, and what is nested too deeply for the functions that walk through it, are errors.

    Raises:
        ValueError: Also as UnicodeDecodeError and JSONDecodeError.
    """
    value = json.loads(text.decode("utf-8"), object_pairs_hook=without_doubles)
    level = [value] if text.count(b"[") + text.count(b"{") > DEEPEST else []
    for _ in range(DEEPEST + 1):
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, dict) else item)
            if isinstance(part, dict | list)
        ]
    if level:
        raise ValueError(f"more than {DEEPEST} levels of lists and objects in one another")
    return value


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as an `object_pairs_hook`.

    Raises:
        ValueError: If a key is given twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return made


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
