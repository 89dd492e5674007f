"""Where preference rows come from: the hub, saved data sets, data files, the built-in example.

First step of the data flow: path -> rows. A source has named splits, a single file has one without a name. Rows are
handed on as mappings in file order, unchecked; `formats.py` gives them meaning. The only owner of `datasets`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow
from datasets.features.features import require_decoding

from dpo.config import Source
from dpo.data import example
from dpo.data.files import FILE_SUFFIXES, first_line, read_files, split_files, stream_files
from dpo.errors import UserError

BUILTIN_WORLD = "builtin:world"
VALIDATION_SPLITS = ("validation", "test")

_OFFLINE_HINT = (
    "without network: download it on a machine that has one (run there once with --prepare_only), copy or share that "
    "cache, set HF_HOME to it and HF_HUB_OFFLINE=1 here; or give a local file"
)


class Rows(Protocol):
    """Rows of one split, in file order: a list of mappings or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def load_source(source: Source, limit: int | None = None) -> Rows:
    """Read one split of a data source.

    Args:
        source: Its `path` is a hub id, a folder (saved by `datasets`, or holding data files), a data file, or
            "builtin:world"; its `split` None takes the only one. A single file is its own split, whatever the name.
        limit: Take the first `limit` rows of the split; None takes all.
    Returns:
        The rows in file order, none of them checked; at least one.
    Raises:
        UserError: Nothing there, not readable, empty, or no such split.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit of {source.path}: got {limit}, must be 1 or more")
    rows = _load(source, limit)
    if len(rows) == 0:
        which = f"split '{source.split}' has no rows" if source.split else "has no rows"
        raise UserError(f"{source.path}: {which}; name another source or split")
    return rows


def stream_source(source: Source, limit: int | None = None) -> Iterator[Any]:
    """Yield the rows of one split of a data source, one by one, holding and keeping none.

    The order is that of the source: files by name, or the hub's shards as listed, and the rows of each in turn.

    Args:
        source, limit: As for `load_source`.
    Raises:
        UserError: As `load_source`, when the first row or the broken one is reached.
    """
    if not _is_builtin(source) and not _is_local(source.path):
        rows = islice(_from_hub(source, lambda: _stream_hub(source)), limit)
        while (row := _from_hub(source, lambda: next(rows, None))) is not None:
            yield row
    elif _is_builtin(source) or _is_saved(_local_path(source)):
        yield from load_source(source, limit)  # in memory, or mapped
    else:
        yield from stream_files(_files_of(source), limit)


def source_identity(source: Source, limit: int | None = None) -> dict[str, Any]:
    """Say which rows a stream will give, without reading them: names, and size and time of local files.

    What changes on the hub under the same name and revision is not seen; a commit as `revision` cannot change.
    """
    place = "path", "subset", "data_dir", "revision", "split"
    known: dict[str, Any] = {name: getattr(source, name) for name in place} | {"limit": limit}
    if not _is_builtin(source) and _is_local(source.path):
        local = _local_path(source)
        files = sorted(local.rglob("*")) if local.is_dir() else [local]
        known["files"] = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return known


def splits_of(source: Source) -> list[str]:
    """Name the splits of a source; empty for a source that is one nameless split, such as a file.

    Args:
        source: As for `load_source`; its own split does not matter.
    Raises:
        UserError: Nothing there or not readable.
    """
    if _is_builtin(source):
        return _builtin_splits(source)
    if not _is_local(source.path):
        return _hub_splits(source)
    folder = _local_path(source)
    if not folder.is_dir():
        return []
    if _is_saved(folder):
        saved = _load_saved(folder)
        return [str(key) for key in saved] if isinstance(saved, datasets.DatasetDict) else []
    return list(split_files(folder))


def validation_split_of(source: Source) -> str | None:
    """Name the split of a source that serves for validation: "validation", else "test", else None."""
    names = splits_of(source)
    return next((name for name in VALIDATION_SPLITS if name in names), None)


def _load(source: Source, limit: int | None) -> Rows:
    if _is_builtin(source):
        return example.rows(_pick_split(source, _builtin_splits(source)), limit=limit)
    if not _is_local(source.path):
        return _take(_without_files(_load_hub(source)), limit)
    local = _local_path(source)
    if _is_saved(local):
        saved = _load_saved(local)
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_pick_split(source, [str(key) for key in saved])]
        return _take(_without_files(saved), limit)
    return _from_files(_files_of(source), limit)


def _files_of(source: Source) -> list[Path]:
    """Data files of a split, in order; a single file is its own split."""
    local = _local_path(source)
    if local.is_file():
        return [local]
    files = split_files(local)
    return files[_pick_split(source, list(files))]


def _is_builtin(source: Source) -> bool:
    return source.path.startswith("builtin:")


def _builtin_splits(source: Source) -> list[str]:
    if source.path != BUILTIN_WORLD:
        raise UserError(f"data '{source.path}': there is one built-in data set, '{BUILTIN_WORLD}'; use that")
    return list(example.SPLIT_SIZES)


def _pick_split(source: Source, names: list[str]) -> str:
    split = source.split
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        wanted = "no split was named" if split is None else f"there is no split '{split}'"
        raise UserError(f"{source.path}: {wanted}; it has {', '.join(names)}")
    return split


def _take(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


# --- the hub ---------------------------------------------------------------------------------------------------------


def _is_local(path: str) -> bool:
    """Tell a path from a hub id ("name" or "owner/name"), which may look alike."""
    return Path(path).exists() or path.endswith(FILE_SUFFIXES) or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path)


def _from_hub(source: Source, open_it: Callable[[], Any]) -> Any:
    """Run a call of `datasets` and turn the ways in which it fails into one line each."""
    path = source.path
    try:
        return open_it()
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"data '{path}': neither a file or folder here nor on the hub ({first_line(error)}); name another"
        ) from error
    except Exception as error:
        # Anything may come out of a hub client; network errors differ with its version and are known by name only.
        what = f"{type(error).__name__} {error}"
        if isinstance(error, OSError) and re.search("connect|offline|timeout|timed out|resolve|http", what, re.I):
            raise UserError(
                f"data '{path}': no such file or folder here, and the hub cannot be reached ({first_line(error)}); "
                f"{_OFFLINE_HINT}"
            ) from error
        what = f"cannot load it from the hub: {first_line(error)}; name another source or split"
        raise UserError(f"data '{path}': {what}") from error


def _open_hub(source: Source, split: str | None, **how: Any) -> Any:
    return datasets.load_dataset(
        source.path, name=source.subset, data_dir=source.data_dir, revision=source.revision, split=split, **how
    )


def _load_hub(source: Source) -> datasets.Dataset:
    found = _from_hub(source, lambda: _open_hub(source, source.split))
    if source.split is not None:
        return found
    return found[_pick_split(source, [str(name) for name in found])]


def _stream_hub(source: Source) -> Iterator[Any]:
    return iter(_without_files(_open_hub(source, source.split or "train", streaming=True)))


def _without_files(rows: Any) -> Any:
    """Leave out columns of images, sounds and the like: reading one would open whatever path or address a row names."""
    names = [name for name, feature in (rows.features or {}).items() if require_decoding(feature)]
    return rows.remove_columns(names) if names else rows


def _hub_splits(source: Source) -> list[str]:
    with contextlib.suppress(Exception):  # without network, or for older kinds of data sets: load from the cache
        names = datasets.get_dataset_split_names(
            source.path, source.subset, revision=source.revision, data_dir=source.data_dir
        )
        return list(names)
    return [str(name) for name in _from_hub(source, lambda: _open_hub(source, None))]


# --- folders and files -----------------------------------------------------------------------------------------------


def _local_path(source: Source) -> Path:
    path = Path(os.path.expanduser(source.path))
    if source.subset is not None:
        raise UserError(
            f"data.subset '{source.subset}': {source.path} is a local path; subsets are of hub data sets, leave it out"
        )
    if source.data_dir is not None:
        path = path / source.data_dir
    if not path.exists():
        raise UserError(f"data '{path}': no such file or folder; name one that is there")
    if path.is_file() and not path.name.endswith(FILE_SUFFIXES):
        raise UserError(f"data '{path}': unknown kind of file; use one of {', '.join(FILE_SUFFIXES)}")
    return path


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(folder: Path) -> Any:
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # its readers raise whatever their file formats raise
        what = f"not a whole folder of datasets.save_to_disk: {first_line(error)}; save it anew, or name another"
        raise UserError(f"data '{folder}': {what}") from error


def _from_files(files: list[Path], limit: int | None) -> Rows:
    rows = read_files(files, limit)
    if not isinstance(rows, pyarrow.Table):
        return rows
    try:
        return datasets.Dataset(rows)
    except (ValueError, TypeError, NotImplementedError, pyarrow.ArrowException) as error:
        why = f"a column of a kind that cannot be read: {first_line(error)}; remove it, or use text"
        raise UserError(f"{files[0]}: {why}") from error
