"""Train, and die by SIGKILL or be asked to stop at a stated moment; started by tests/ranks.py.

    tests/invariants/run_killed.py MOMENT[:SIGNAL] [arguments of train_dpo.py]

MOMENT: never, after_sft, in_step:N, in_evaluation:N, in_save:N or in_final.
With SIGNAL the last rank alone gets it, at that moment; else every rank dies.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import dpo.preference
import dpo.runtime.engine
import dpo.train
import train_dpo
from dpo.runtime import checkpoint
from tests.invariants.jobs import without_drawings


def die(*_: Any, **__: Any) -> None:
    """What a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def ask(number: int) -> Callable[[], None]:
    """What a scheduler does, to one of the ranks."""

    def last_rank_alone() -> None:
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), number)

    return last_rank_alone


def at_call(number: int, function: Callable[..., Any], strike: Callable[[], None]) -> Callable[..., Any]:
    """Strike in the `number`-th call, before it does anything."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            strike()
        return function(*args, **kwargs)

    return wrapped


if __name__ == "__main__":
    without_drawings()
    moment, number, name = (sys.argv[1] + "::").split(":")[:3]
    strike = ask(getattr(signal, name)) if name else die
    if moment == "after_sft":
        dpo.train.start_models = die  # type: ignore[assignment]
    elif moment == "in_step":
        dpo.runtime.engine.step = at_call(int(number), dpo.runtime.engine.step, strike)
    elif moment == "in_evaluation":
        dpo.preference.evaluate = at_call(int(number), dpo.preference.evaluate, strike)
    elif moment == "in_save":
        checkpoint.write_whole = at_call(int(number), checkpoint.write_whole, strike)
    elif moment == "in_final":
        dpo.train.write_weights = at_call(1, dpo.train.write_weights, strike)
    sys.exit(train_dpo.main(sys.argv[2:]))
