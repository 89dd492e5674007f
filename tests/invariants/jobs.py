"""Start `run_many.py` on some ranks and read what the runs left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.runtime.tracking import read_lines
from tests.ranks import run as run_on_ranks


@dataclass(frozen=True)
class Run:
    """What a training run left.

    Attributes:
        folder: The run directory.
        lines: Of metrics.jsonl.
        seen: What `run_many.watch` saw, per rank.
    """

    folder: Path
    lines: list[dict[str, Any]]
    seen: list[dict[str, Any]]


def without_drawings(change: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have runs of this process leave out what takes longer than a few steps: curves and report."""
    import dpo.training.finish

    for name in ("plot", "write_or_say"):
        change(dpo.training.finish, name, lambda *_, **__: None)


def train_all(folder: Path, jobs: dict[str, list[str]], ranks: int, timeout: float = 900) -> dict[str, Run]:
    """Run every job in one process group of `ranks` ranks, each in folder/NAME; NAME+ANYTHING goes on with that run."""
    folder.mkdir(parents=True, exist_ok=True)
    argvs = {name: [*argv, "--train.output_dir", str(_output(folder, name))] for name, argv in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps(argvs))
    done = run_on_ranks(["tests/invariants/run_many.py", str(folder / "jobs.json"), str(folder)], ranks, timeout)
    assert not any(done.codes), done.output[-8000:]
    runs = {}
    for name in jobs:
        seen = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(ranks)]
        runs[name] = Run(_output(folder, name), read_lines(_output(folder, name)), seen)
    return runs


def _output(folder: Path, name: str) -> Path:
    return folder / name.partition("+")[0]
