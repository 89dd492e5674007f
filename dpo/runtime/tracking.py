"""What a run shows and records: console lines, a progress bar, metrics.jsonl, and trackers of the user's choice.

Only rank 0 has a tracker; the others get `Silent`, so the loop never asks who it is in order to log.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpo.runtime import console
from dpo.runtime.files import read_records, write_records
from dpo.runtime.preemption import Preempted
from dpo.runtime.trackers import BACKENDS, Backend


class Silent:
    """The tracker of every rank but the first."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Do nothing."""

    def record(self, values: dict[str, Any]) -> None:
        """Do nothing."""

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Do nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with null for what JSON cannot say (NaN, infinity)."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Recorder:
    """The tracker of rank 0.

    Args:
        run: The run directory.
        config: Resolved settings, handed to the trackers.
        backends: Names in BACKENDS; they start with the first line, when the audit of the data has been written.
    """

    def __init__(self, run: Path, config: dict[str, Any], backends: Sequence[str] = ()) -> None:
        self._console = console.console_on(sys.stderr)
        self._run, self._config, self._names = run, config, backends
        self._before = read_lines(run) if backends else []  # whatever a resumed run is about to drop
        self._backends: list[Backend] = []
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage = ""
        self._first, self._since = 0, 0.0

    def say(self, text: str) -> None:
        """Show a line."""
        console.say(self._console, text)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Show a table; its first row is the heading."""
        console.show_table(self._console, title, rows[1:], rows[0])

    def record(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and to the trackers."""
        values = finite(values)
        with open(self._run / "metrics.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")
        if len(self._backends) < len(self._names):
            self._backends = [BACKENDS[name](self._run, self._config, self._before) for name in self._names]
        for write, _ in self._backends:
            write(values)

    def progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move the progress bar; on a terminal a bar, in a log file about twenty lines a stage."""
        is_new, self._stage = stage != self._stage, stage
        if is_new:
            self._first, self._since = done, time.monotonic()
        if not self._console.is_terminal:
            if done == total or done % max(1, total // 20) == 0:
                self.say(f"{stage} {done}/{total} {note}{self._left(done, total)}")
            return
        if self._bar is None or is_new:
            self._stop_bar()
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(stage, total=total, note="", completed=done - 1)
        self._bar.update(self._task, completed=done, total=total, note=note)
        if done == total:
            self._stop_bar()

    def _left(self, done: int, total: int) -> str:
        """How long the rest of a stage takes at the pace so far, evaluations and checkpoints among it."""
        if done == self._first or done == total:
            return ""
        seconds = (time.monotonic() - self._since) / (done - self._first) * (total - done)
        return f"  {timedelta(seconds=round(seconds))} left"

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Give the terminal back; trackers are told the end, but of a failure: theirs would look like success."""
        self._stop_bar()
        if kind is None or issubclass(kind, Preempted):
            for _, finish in self._backends:
                finish()


Tracker = Recorder | Silent
"""Where a run reports to."""


def keep_lines(run: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop lines of metrics.jsonl that a resumed run will write again; the file is replaced in one move.

    Args:
        run: The run directory.
        keep: Decides for a line's values; a torn last line is dropped.
    """
    path = run / "metrics.jsonl"
    if path.exists():
        write_records(path, [line for line in read_lines(run) if keep(line)])


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none if there is no file."""
    return read_records(run / "metrics.jsonl")[0]
