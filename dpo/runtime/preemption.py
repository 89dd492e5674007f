"""Signals -> "stop at the next step".

SIGTERM, SIGINT and SIGUSR1 only raise a flag. Ranks look at it together, at every step, between the micro-batches of
evaluations and caches, and around samples, so all of them stop at the same place: the run is checkpointed and ends with
exit code 75. A launcher passes a signal on to processes that got it already, so what follows within ECHO_SECONDS is the
same signal; a later one ends the process at once. SIGTERM after SIGUSR1 is the exception: a scheduler announces the end
by one and sends the other when it has come, and what is being written then may still be completed.

On one node the deepspeed command passes no signal on: it dies, and its launcher and all ranks would train on unseen. So
its end counts as a wish to stop too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from dpo.runtime.distributed import any_rank

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 3.0

_asked: list[tuple[int, float]] = []
_command: list[int | None] = [None]
GONE = 0
"""In place of a signal's number: the command that started the run is gone."""


class Preempted(Exception):
    """All ranks stop here, alike; the message says why."""


def _notice(number: int, frame: FrameType | None) -> None:
    is_end_announced = bool(_asked) and _asked[0][0] in (signal.SIGUSR1, GONE) and number == signal.SIGTERM
    if _asked and not is_end_announced and time.monotonic() - _asked[0][1] > ECHO_SECONDS:
        os._exit(128 + number)
    _asked.append((number, time.monotonic()))


def _deepspeed_command() -> int | None:
    """Process id of the deepspeed command, the parent of its launcher; None under another launcher, or without it."""
    try:
        launcher = Path(f"/proc/{os.getppid()}")
        if b"deepspeed.launcher.launch" not in (launcher / "cmdline").read_bytes():
            return None
        parent = int((launcher / "stat").read_text().rpartition(")")[2].split()[1])
        names = [os.path.basename(word) for word in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")[:3]]
    except OSError:
        return None
    return parent if {b"deepspeed", b"ds", b"deepspeed.launcher.runner"} & set(names) else None


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as a wish to stop within the block; one that the launcher held back until then counts at once.

    After it those that were held back are so again: one that comes while the result is written ends no process.
    """
    _asked.clear()
    _command[0] = _deepspeed_command()
    before = {number: signal.signal(number, _notice) for number in SIGNALS}
    held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def is_asked() -> bool:
    """Whether this rank was asked to stop; other ranks may not know yet."""
    if not _asked and _command[0] is not None and _deepspeed_command() != _command[0]:
        _asked.append((GONE, time.monotonic()))
    return bool(_asked)


def _why() -> str:
    if not _asked:
        return "a signal reached another rank"
    number = _asked[0][0]
    return "the deepspeed command is gone" if number == GONE else f"{signal.Signals(number).name} received"


def stop_if(asked: bool) -> None:
    """Stop where all ranks know that one was asked to.

    Raises:
        Preempted: If `asked`, which must be the same on every rank.
    """
    if asked:
        raise Preempted(_why())


def check(device: torch.device) -> None:
    """Stop if any rank was asked to; collective: one all-reduce of a number, for whose result the host waits.

    Args:
        device: Of this rank.
    Raises:
        Preempted: On every rank.
    """
    stop_if(any_rank(torch.full((), is_asked(), device=device)))
