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


def load_source(
    path: str | Path,
    *,
    subset: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    split: str | None = "train",
    limit: int | None = None,
) -> Rows:
    """Read one split of a data source.

    Args:
        path: Hub id, folder (saved by `datasets`, or holding data files), data file, or "builtin:world".
        subset: Configuration of a hub data set.
        data_dir: Folder inside a hub data set or a local folder.
        revision: Branch, tag or commit of a hub data set.
        split: Name of the split; None takes the only one. A single file is its own split, whatever the name.
        limit: Take the first `limit` rows of the split; None takes all.
    Returns:
        The rows in file order, none of them checked; at least one.
    Raises:
        UserError: Nothing there, not readable, empty, or no such split.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit of {path}: got {limit}, must be 1 or more")
    rows = _load(str(path), subset, data_dir, revision, split, limit)
    if len(rows) == 0:
        which = f"split '{split}' has no rows" if split else "has no rows"
        raise UserError(f"{path}: {which}; name another source or split")
    return rows


def stream_source(
    path: str | Path,
    *,
    subset: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    split: str | None = "train",
    limit: int | None = None,
) -> Iterator[Any]:
    """Yield the rows of one split of a data source, one by one, holding and keeping none.

    The order is that of the source: files by name, or the hub's shards as listed, and the rows of each in turn.

    Args:
        path, subset, data_dir, revision, split, limit: As for `load_source`.
    Raises:
        UserError: As `load_source`, when the first row or the broken one is reached.
    """
    name = str(path)
    if name.startswith("builtin:"):
        yield from load_source(name, split=split, limit=limit)
    elif not _is_local(name):
        opened = _from_hub(name, lambda: _stream_hub(name, subset, data_dir, revision, split))
        rows = islice(opened, limit)
        while (row := _from_hub(name, lambda: next(rows, None))) is not None:
            yield row
    else:
        source = _local_path(name, subset, data_dir)
        if source.is_dir() and _is_saved(source):
            yield from load_source(name, data_dir=data_dir, split=split, limit=limit)  # memory-mapped
        else:
            yield from stream_files(_files_of(source, name, split), limit)


def source_identity(
    path: str | Path,
    *,
    subset: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    split: str | None = "train",
    limit: int | None = None,
) -> dict[str, Any]:
    """Say which rows a stream will give, without reading them: names, and size and time of local files.

    What changes on the hub under the same name and revision is not seen; a commit as `revision` cannot change.
    """
    name = str(path)
    known: dict[str, Any] = dict(
        path=name, subset=subset, data_dir=data_dir, revision=revision, split=split, limit=limit
    )
    if not name.startswith("builtin:") and _is_local(name):
        source = _local_path(name, subset, data_dir)
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        known["files"] = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return known


def splits_of(
    path: str | Path, *, subset: str | None = None, data_dir: str | None = None, revision: str | None = None
) -> list[str]:
    """Name the splits of a source; empty for a source that is one nameless split, such as a file.

    Args:
        path, subset, data_dir, revision: As for `load_source`.
    Raises:
        UserError: Nothing there or not readable.
    """
    name = str(path)
    if name.startswith("builtin:"):
        return _builtin_splits(name)
    if not _is_local(name):
        return _hub_splits(name, subset, data_dir, revision)
    folder = _local_path(name, subset, data_dir)
    if not folder.is_dir():
        return []
    if _is_saved(folder):
        saved = _load_saved(folder)
        return [str(key) for key in saved] if isinstance(saved, datasets.DatasetDict) else []
    return list(split_files(folder))


def validation_split_of(
    path: str | Path, *, subset: str | None = None, data_dir: str | None = None, revision: str | None = None
) -> str | None:
    """Name the split of a source that serves for validation: "validation", else "test", else None."""
    names = splits_of(path, subset=subset, data_dir=data_dir, revision=revision)
    return next((name for name in VALIDATION_SPLITS if name in names), None)


def _load(
    path: str, subset: str | None, data_dir: str | None, revision: str | None, split: str | None, limit: int | None
) -> Rows:
    if path.startswith("builtin:"):
        return example.rows(_pick_split(path, split, _builtin_splits(path)), limit=limit)
    if not _is_local(path):
        return _take(_without_files(_load_hub(path, subset, data_dir, revision, split)), limit)
    source = _local_path(path, subset, data_dir)
    if source.is_dir() and _is_saved(source):
        saved = _load_saved(source)
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_pick_split(path, split, [str(key) for key in saved])]
        return _take(_without_files(saved), limit)
    return _from_files(_files_of(source, path, split), limit)


def _files_of(source: Path, path: str, split: str | None) -> list[Path]:
    """Data files of a split, in order; a single file is its own split."""
    if source.is_file():
        return [source]
    files = split_files(source)
    return files[_pick_split(path, split, list(files))]


def _builtin_splits(path: str) -> list[str]:
    if path != BUILTIN_WORLD:
        raise UserError(f"data '{path}': there is one built-in data set, '{BUILTIN_WORLD}'; use that")
    return list(example.SPLIT_SIZES)


def _pick_split(path: str, split: str | None, names: list[str]) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        wanted = "no split was named" if split is None else f"there is no split '{split}'"
        raise UserError(f"{path}: {wanted}; it has {', '.join(names)}")
    return split


def _take(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


# --- the hub ---------------------------------------------------------------------------------------------------------


def _is_local(path: str) -> bool:
    """Tell a path from a hub id ("name" or "owner/name"), which may look alike."""
    return Path(path).exists() or path.endswith(FILE_SUFFIXES) or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path)


def _from_hub(path: str, open_it: Callable[[], Any]) -> Any:
    """Run a call of `datasets` and turn the ways in which it fails into one line each."""
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


def _load_hub(
    path: str, subset: str | None, data_dir: str | None, revision: str | None, split: str | None
) -> datasets.Dataset:
    def load(name: str | None) -> Any:
        return datasets.load_dataset(path, name=subset, data_dir=data_dir, revision=revision, split=name)

    if split is not None:
        return _from_hub(path, lambda: load(split))
    found = _from_hub(path, lambda: load(None))
    return found[_pick_split(path, None, [str(name) for name in found])]


def _stream_hub(
    path: str, subset: str | None, data_dir: str | None, revision: str | None, split: str | None
) -> Iterator[Any]:
    opened = datasets.load_dataset(
        path, name=subset, data_dir=data_dir, revision=revision, split=split or "train", streaming=True
    )
    return iter(_without_files(opened))


def _without_files(rows: Any) -> Any:
    """Leave out columns of images, sounds and the like: reading one would open whatever path or address a row names."""
    names = [name for name, feature in (rows.features or {}).items() if require_decoding(feature)]
    return rows.remove_columns(names) if names else rows


def _hub_splits(path: str, subset: str | None, data_dir: str | None, revision: str | None) -> list[str]:
    with contextlib.suppress(Exception):  # without network, or for older kinds of data sets: load from the cache
        return list(datasets.get_dataset_split_names(path, subset, revision=revision, data_dir=data_dir))
    found = _from_hub(
        path, lambda: datasets.load_dataset(path, name=subset, data_dir=data_dir, revision=revision)
    )
    return [str(name) for name in found]


# --- folders and files -----------------------------------------------------------------------------------------------


def _local_path(path: str, subset: str | None, data_dir: str | None) -> Path:
    source = Path(os.path.expanduser(path))
    if subset is not None:
        raise UserError(f"data.subset '{subset}': {path} is a local path; subsets are of hub data sets, leave it out")
    if data_dir is not None:
        source = source / data_dir
    if not source.exists():
        raise UserError(f"data '{source}': no such file or folder; name one that is there")
    if source.is_file() and not source.name.endswith(FILE_SUFFIXES):
        raise UserError(f"data '{source}': unknown kind of file; use one of {', '.join(FILE_SUFFIXES)}")
    return source


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
