"""A rank of benchmarks/soak.py: it trains, and writes down which phase it is in."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dpo.preference
import dpo.runtime.checkpoint
import dpo.runtime.engine
import dpo.sft
import dpo.train
import dpo.training.frozen
import dpo.training.reference_cache
import train_dpo

PHASES = ("step", "evaluation", "checkpoint", "cache", "sft")
SEPARATOR = "\t"


@dataclass(frozen=True)
class Entry:
    """A line of a trace: a phase, an update of weights, or -phase at its end; at, in seconds."""

    name: str
    at: float


def read_trace(path: Path) -> list[Entry]:
    """The entries that are whole."""
    lines = path.read_text().split("\n")[:-1]
    return [Entry(name, float(at)) for name, at in (line.split(SEPARATOR) for line in lines)]


def open_phases(entries: list[Entry]) -> list[str]:
    """Phases that were entered and not left, outermost first."""
    stack: list[str] = []
    for entry in entries:
        if entry.name in PHASES:
            stack.append(entry.name)
        elif entry.name.removeprefix("-") in PHASES:
            stack.pop()
    return stack


def _traced(owner: Any, name: str, phase: str | Callable[..., str], write: Callable[[str], None]) -> None:
    """Have a function write down when it begins and ends."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _phase(phase if isinstance(phase, str) else phase(*args), write):
            return function(*args, **kwargs)

    setattr(owner, name, wrapped)


@contextlib.contextmanager
def _phase(name: str, write: Callable[[str], None]) -> Iterator[None]:
    write(name)
    yield
    write(f"-{name}")


def _build_or_check(_score: Any, _loader: Any, manifest: dict[str, object], cache: Path, *_: Any) -> str:
    """A cache that is whole is only looked at."""
    is_whole = (dpo.training.reference_cache.folder_of(cache, manifest) / "manifest.json").exists()
    return "cache check" if is_whole else "cache"


def run_rank(rank: int, world_size: int, port: int, folder: str, argv: list[str]) -> None:
    """Be one rank of a job, as a launcher would start it.

    Args:
        rank, world_size: Its place.
        port: Of the rendezvous on this host.
        folder: For traces and output.
        argv: Of train_dpo.py.
    """
    trace = os.open(f"{folder}/trace-{rank}", os.O_WRONLY | os.O_APPEND)
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def write(name: str) -> None:
        os.write(trace, f"{name}{SEPARATOR}{time.monotonic():.6f}\n".encode())

    dpo.training.reference_cache.CHUNK = 16
    _traced(dpo.preference, "take_step", "step", write)
    _traced(dpo.preference, "evaluate", "evaluation", write)
    _traced(dpo.train, "run_sft", "sft", write)
    _traced(dpo.training.frozen, "cached_scores", _build_or_check, write)
    _traced(dpo.training.export, "save", "checkpoint", write)
    _traced(dpo.runtime.engine, "step", "update", write)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    places |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    sys.exit(train_dpo.main(argv))
