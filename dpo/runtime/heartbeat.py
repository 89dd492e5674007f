"""Is every rank alive, and is it making progress?

Each rank leaves a note about itself in the launcher's key-value store, from a thread that neither a long phase nor a
collective stops, every 30 s (a quarter of the time-out where that is less). Rank 0 reads the notes of all, the others
that of rank 0. Three things end the job, with one line that names the ranks:

    dead     a process of this host is gone; looked at every second
    silent   a note has not changed for train.hang_timeout: the rank is frozen or cut off, whatever its phase
    stuck    the notes change, but all ranks are within a step and none has got on for train.hang_timeout, or for ten
             times the longest pause so far; the one furthest behind is named. Not in a stage's first step, which may
             compile

Nothing interrupts a rank that waits for others in a collective, so the one that notices ends its own process, and kills
the rank in question where that is a child of the same launcher: a stopped process hears no other signal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo.errors import UserError, one_line
from dpo.runtime import distributed
from dpo.runtime.distributed import World
from dpo.runtime.preemption import Preempted
from dpo.runtime.status import read_status, write_status

LOOK_SECONDS = 1.0
NOTE_SECONDS = 30.0
"""Longest time between two notes."""
LONGER = 10
"""A step may stand still for this many times the longest pause so far."""
NAMED = 8
"""Ranks that a line names, of more."""


def _launcher() -> str:
    """Names the parent process on this boot of this host, as seen from this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getppid()}"
    except OSError:
        return ""  # no Linux: nothing is known of other processes


@dataclass
class Note:
    """What a rank says of itself.

    Attributes:
        host, pid, launcher: Its process and that of its launcher.
        beat: Notes so far.
        count: Places that the main thread has come to, see `at`.
        doing: The last of them.
        in_step: Whether the next one is not far.
    """

    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    launcher: str = field(default_factory=_launcher)
    beat: int = 0
    count: int = 0
    doing: str = "preparing the run"
    in_step: bool = False


@dataclass
class _Pace:
    """When the main thread came to its place, in seconds; the longest way between places of a step; steps done."""

    since: float = 0.0
    longest: float = 0.0
    steps: int = 0
    in_step: bool = False


_note, _pace = Note(), _Pace()
_watches: list[Watch] = []


def at(doing: str, *, in_step: bool = False) -> None:
    """Say which place the main thread has come to; reads a clock and sets a few fields.

    Args:
        doing: For the line that names a rank, such as "in step 12, micro-batch 3".
        in_step: Whether the next place is less than train.hang_timeout away.
    """
    now = time.monotonic()
    if _pace.in_step:
        _pace.longest = max(_pace.longest, now - _pace.since)
        _pace.steps += not in_step
    _pace.since, _pace.in_step = now, in_step
    _note.doing, _note.in_step = doing, in_step and _pace.steps > 0
    _note.count += 1


def at_first_step() -> None:
    """Say that a stage begins: its first step may compile, and take however long."""
    _pace.steps, _pace.longest, _pace.in_step = 0, 0.0, False


def place() -> str:
    """What `at` was last told."""
    return _note.doing


def _is_dead(note: Note) -> bool:
    """Whether the process of a note is gone, as far as this one can tell."""
    if note.launcher != _note.launcher or not note.launcher:
        return False
    try:
        return Path(f"/proc/{note.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _kill(note: Note) -> None:
    """Kill a child of the same launcher."""
    if note.launcher == _launcher() != "" and not _is_dead(note):
        with contextlib.suppress(OSError):
            os.kill(note.pid, signal.SIGKILL)


@dataclass
class Watch:
    """What one rank knows of those it looks at.

    Attributes:
        store: Of the launcher: `set` and `multi_get`.
        rank, world_size: Of the one that looks.
        run: The run directory.
        timeout: train.hang_timeout, in seconds.
        speaks: Whether it is this rank that says so when the job ends.
        notes: The last of every rank that is looked at.
        heard, moved: When a rank's note, and its main thread's place, last changed; by this process's clock alone.
        trouble: What the store said when it did not answer.
    """

    store: Any
    rank: int
    world_size: int
    run: Path
    timeout: float
    speaks: bool
    notes: dict[int, Note] = field(default_factory=dict)
    heard: dict[int, float] = field(default_factory=dict)
    moved: dict[int, float] = field(default_factory=dict)
    trouble: str = ""
    looked: float | None = None

    @property
    def others(self) -> range:
        """The ranks that are looked at."""
        return range(1, self.world_size) if self.rank == 0 else range(1)

    def tell(self) -> None:
        """Leave a new note."""
        _note.beat += 1
        self.store.set(_key(self.rank), json.dumps(asdict(_note)))

    def read(self) -> None:
        """Take in the notes of the others."""
        texts = self.store.multi_get([_key(rank) for rank in self.others])
        for rank, text in zip(self.others, texts, strict=True):
            self.take(rank, Note(**json.loads(text)), time.monotonic())

    def take(self, rank: int, note: Note, now: float) -> None:
        """Take in a note that was read at a time."""
        before = self.notes.get(rank)
        if before is None or before.beat != note.beat:
            self.heard[rank] = now
        if before is None or before.count != note.count:
            self.moved[rank] = now
        self.notes[rank] = note

    def look(self, now: float) -> tuple[str, list[int]] | None:
        """Judge the others.

        Args:
            now: Of `time.monotonic`; called every LOOK_SECONDS.
        Returns:
            What is wrong, in one line, and the ranks that it names; None if nothing is.
        """
        if self.looked is not None and (gap := now - self.looked) > self.timeout / 2 + LOOK_SECONDS:
            # This very process was stopped, by a job scheduler perhaps, and so may the others have been.
            self.heard = {rank: at + gap for rank, at in self.heard.items()}
            self.moved = {rank: at + gap for rank, at in self.moved.items()}
        self.looked = now
        if dead := [rank for rank, note in self.notes.items() if _is_dead(note)]:
            return f"{self._named(dead)} died", dead
        if silent := [rank for rank in self.notes if now - self.heard[rank] > self.timeout]:
            store = f" (its store: {self.trouble})" if self.trouble else ""
            return f"{self._named(silent)} gave no sign of life for {self.timeout:g} s{store}", silent
        if self.rank == 0 and self._stands_still(now):
            everyone = {0: _note, **self.notes}
            least = min(note.count for note in everyone.values())
            behind = [rank for rank, note in everyone.items() if note.count == least]
            return f"no rank gets on; furthest behind: {self._named(behind)}", behind
        return None

    def _stands_still(self, now: float) -> bool:
        """Whether every rank is within a step and none has got on for long."""
        limit = max(self.timeout, LONGER * _pace.longest)
        places = [*self.notes.values(), _note]
        return all(note.in_step for note in places) and now - max(_pace.since, *self.moved.values()) > limit

    def _named(self, ranks: list[int]) -> str:
        notes = {0: _note, **self.notes} if self.rank == 0 else self.notes
        words = [
            f"rank {rank} on {notes[rank].host} (process {notes[rank].pid}, last known {notes[rank].doing})"
            for rank in ranks[:NAMED]
        ]
        more = [f"{len(ranks) - NAMED} more ranks"] if len(ranks) > NAMED else []
        return ", ".join(words + more)

    def end(self, line: str, ranks: list[int]) -> None:
        """Say why, kill what hangs here, and leave.

        Args:
            line, ranks: As `look` gives them.
        """
        faulthandler.dump_traceback_later(30, exit=True)  # what hangs may be the file system that is written to
        line = f"{line}; the job is ended: start it again to go on from its newest checkpoint"
        if self.speaks:
            print(f"train_dpo.py: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            status = read_status(self.run)
            # Of an exception alone the reason is what this has led to; a rank that gave up has said why.
            unexplained = re.match(r"\w+(Error|Exception): ", status.get("reason", ""))
            if self.speaks and (status.get("state") == "running" or (status.get("state") == "failed" and unexplained)):
                write_status(self.run, "failed", reason=line, place=status.get("place", ""))
        for rank in set(ranks) - {self.rank}:
            _kill(self.notes[rank])
        os._exit(1)


def _key(rank: int) -> str:
    """torchrun keeps its store over restarts."""
    return f"dpo/heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


@contextlib.contextmanager
def explaining() -> Iterator[None]:
    """Where a collective of the block fails because a process of this host is gone, say so and leave.

    At once, within what writes status.json: the launcher ends this process soon after the other.
    """
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception:
        for watch in _watches:
            time.sleep(LOOK_SECONDS / 2)  # its sockets are closed a little before it counts as gone
            if found := watch.look(time.monotonic()):
                watch.end(*found)
        raise


@contextlib.contextmanager
def watching(world: World, run: Path, timeout: int) -> Iterator[None]:
    """Look after one another within the block; collective.

    Args:
        world: This rank.
        run: The run directory, whose status.json is to say why the job ended.
        timeout: train.hang_timeout in seconds; 0: nobody looks.
    """
    vars(_note).update(vars(Note()))
    vars(_pace).update(vars(_Pace()))
    if world.world_size == 1 or timeout == 0:
        yield
        return
    speaks = world.rank == 0 or world.local_rank <= 1  # not thousands of lines when rank 0 is lost
    watch = Watch(distributed.store(), world.rank, world.world_size, run, timeout, speaks)
    watch.tell()
    distributed.agree(None)  # every note is there
    watch.read()
    stopping = threading.Event()

    def talk() -> None:
        try:
            pause = LOOK_SECONDS  # a rank that dies early is not "preparing the run" any more
            while not stopping.wait(min(pause, NOTE_SECONDS, timeout / 4)):
                watch.tell()
                watch.read()
                pause *= 2
        except Exception as error:
            watch.trouble = one_line(error, 200)

    def judge() -> None:
        while not stopping.wait(LOOK_SECONDS):
            if found := watch.look(time.monotonic()):
                watch.end(*found)

    threads = [threading.Thread(target=work, daemon=True) for work in (talk, judge)]
    for thread in threads:
        thread.start()
    _watches.append(watch)
    try:
        yield
        distributed.agree(None)  # a process that ends before the others are through would count as dead
    finally:
        _watches.clear()
        stopping.set()
        for thread in threads:
            thread.join(LOOK_SECONDS)  # a store that does not answer holds nobody up
