"""Files of a run directory: written whole or not at all, and read although the last line may be torn."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
        path: Replaced if it is there.
        content: Text, written as UTF-8, or bytes.
    """
    rank = os.environ.get("RANK", "0")  # several may write why the job ends
    new = path.with_name(f"{path.name}.new{'' if rank == '0' else rank}")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(new)
    os.replace(new, path)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of one JSON object a line, as `write_whole` does; texts in their own script, which can be read."""
    write_whole(path, "".join(_line(record) for record in records))


def _line(record: Mapping[str, Any]) -> str:
    line = json.dumps(record, ensure_ascii=False) + "\n"
    # Half a surrogate pair, as in arguments of a call that were cut, has no UTF-8.
    return line if line.isascii() or not re.search("[\ud800-\udfff]", line) else json.dumps(record) + "\n"


def flush(path: Path) -> None:
    """Have what was written to a file go to the disk now; a machine that loses power keeps it.

    Raises:
        OSError: If it cannot be; some disks say only here that they are full.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Read a file of one JSON object a line.

    Args:
        path: May be missing. Lines end with a line feed and nothing else: U+2028 may stand within a text.
    Returns:
        The objects, and whether the last line is torn, as a killed process leaves it.
    Raises:
        UserError: A line before the last is no JSON object.
    """
    if not path.exists():
        return [], False
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # UnicodeDecodeError among them
            if number == len(lines):
                return records, True
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is no JSON object; fix or delete it")
        records.append(record)
    return records, False
