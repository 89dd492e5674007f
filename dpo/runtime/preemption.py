"""Signals -> "stop at the next step".

SIGTERM, SIGINT and SIGUSR1 only raise a flag. Ranks look at it together, at every step, between the micro-batches of
evaluations and caches, and around samples, so all of them stop at the same place: the run is checkpointed and ends with
exit code 75. A launcher passes a signal on to processes that got it already, so what follows within ECHO_SECONDS is the
same signal; a later one ends the process at once. SIGTERM after SIGUSR1 is the exception: a scheduler announces the end
by one and sends the other when it has come, and what is being written then may still be completed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from dpo.runtime.distributed import any_rank

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 3.0

_asked: list[tuple[int, float]] = []


class Preempted(Exception):
    """All ranks stop here, alike; the message says why."""


def _notice(number: int, frame: FrameType | None) -> None:
    is_end_announced = bool(_asked) and (_asked[0][0], number) == (signal.SIGUSR1, signal.SIGTERM)
    if _asked and not is_end_announced and time.monotonic() - _asked[0][1] > ECHO_SECONDS:
        os._exit(128 + number)
    _asked.append((number, time.monotonic()))


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as a wish to stop within the block; one that the launcher held back until then counts at once.

    After it those that were held back are so again: one that comes while the result is written ends no process.
    """
    _asked.clear()
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
    return bool(_asked)


def _why() -> str:
    return f"{signal.Signals(_asked[0][0]).name} received" if _asked else "a signal reached another rank"


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
