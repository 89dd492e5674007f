"""manifest.json of a checkpoint: every file's size and checksum, and a checksum of itself. It is written last.

Checksums are XXH3: they find bits that fell over and files that were cut, which is what disks do, at the speed of
memory. Every rank takes its share of the files, since a checkpoint of a large model takes minutes to read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import xxhash

from dpo.runtime.distributed import World, gather, only_main
from dpo.runtime.files import flush, write_whole

NAME = "manifest.json"
CHUNK = 1 << 24


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while part := stream.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _own_checksum(files: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != NAME)


def _reader(name: str, place: int, world_size: int) -> int:
    """Rank that reads a file: the one that wrote it, whose host may still have it in memory, where its name tells."""
    written_by = re.search(r"pp_rank_(\d+)_mp_rank", name)
    return (int(written_by[1]) if written_by else place) % world_size


def write_manifest(folder: Path, world: World) -> None:
    """Describe every file of a folder, all of it on the disk afterwards; collective.

    Args:
        folder: Complete, on a file system that all ranks see.
        world: This rank.
    """
    names = only_main(world, lambda: _files(folder))
    mine = {}
    for place, name in enumerate(names):
        if _reader(name, place, world.world_size) == world.rank:
            flush(folder / name)
            mine[name] = {"bytes": (folder / name).stat().st_size, "xxh3_128": _checksum(folder / name)}
    files = {name: entry for share in gather(mine) for name, entry in share.items()}
    text = json.dumps({"files": files, "xxh3_128": _own_checksum(files)}, indent=1)
    only_main(world, lambda: write_whole(folder / NAME, text))


def _read(folder: Path) -> dict[str, Any] | str:
    """The files that a manifest lists, or what is wrong with it."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files = content["files"]
        whole = content["xxh3_128"] == _own_checksum(files)
    except OSError:
        return f"{NAME} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{NAME} is damaged"
    return files if whole else f"{NAME} is damaged"


def complaint(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; collective.

    Args:
        folder: Of the checkpoint.
        world: This rank.
    Returns:
        One phrase; None if every file is as it was written.
    """
    files = only_main(world, lambda: _read(folder))
    if isinstance(files, str):
        return files
    found = None
    for name in sorted(files)[world.rank :: world.world_size]:
        path, entry = folder / name, files[name]
        if not path.is_file():
            found = f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            found = f"{name} has {path.stat().st_size:,} bytes of {entry['bytes']:,}"
        elif _checksum(path) != entry["xxh3_128"]:
            found = f"{name} is not what was written (checksum)"
        if found:
            break
    return next((text for text in gather(found) if text is not None), None)


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint as its manifest has them; 0 if it cannot be read."""
    files = _read(folder)
    return 0 if isinstance(files, str) else sum(entry["bytes"] for entry in files.values())
