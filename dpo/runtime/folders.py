"""Folders that appear whole or not at all, and that go at once.

A folder is filled under a temporary name, its files are on the disk before it gets its own, and it loses that before it
is deleted: whatever stops a process, what bears its own name is whole. What a killed process leaves in the folder of
checkpoints the next start removes, what it leaves elsewhere the next `publish`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from dpo.errors import UserError, one_line
from dpo.runtime.distributed import World, only_main
from dpo.runtime.files import flush


def flush_tree(folder: Path) -> None:
    """Have every file of a folder written to the disk, and the folder itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    with suppress(OSError):  # not every file system has it for folders
        flush(folder)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Give a finished folder its name; an older one of that name goes."""
    _flush_names(unfinished)
    drop(folder)
    os.replace(unfinished, folder)
    _flush_names(folder.parent)


def drop(folder: Path) -> None:
    """Delete a folder, if it is there; what cannot be deleted now, since somebody reads it, at the next start."""
    going = folder.with_name(f"partial-old-{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    with suppress(OSError):
        os.rename(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def drop_leftovers(parent: Path) -> None:
    """Delete what processes that were killed have left in the folder of checkpoints."""
    for pattern in ("partial-*", "universal-*"):
        for folder in parent.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, write: Callable[[Path], None], world: World) -> None:
    """Make a folder appear whole or not at all: rank 0 fills a temporary one and renames it.

    Args:
        folder: Its final name; an older folder of that name is replaced.
        write: Fills the folder it is given; called on rank 0 alone.
        world: This rank.
    Raises:
        UserError: If it cannot be written; an older folder of that name stays.
    """

    def make() -> None:
        unfinished = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            write(unfinished)
            flush_tree(unfinished)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            what = one_line(error, 300)
            raise UserError(f"{folder} cannot be written: {what}; make room and start again") from None
        put_in_place(unfinished, folder)

    only_main(world, make)
