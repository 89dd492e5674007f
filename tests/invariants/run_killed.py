"""Train, and die by SIGKILL at a stated moment; started by python or torchrun.

    tests/invariants/run_killed.py {after_sft|in_step:N|in_evaluation:N|in_save:N} [arguments of train_dpo.py]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import dpo.runtime.engine
import dpo.train
import train_dpo
from dpo.runtime import checkpoint


def die(*_: Any, **__: Any) -> None:
    """What a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Die in the `number`-th call, halfway for what calls others."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            die()
        return function(*args, **kwargs)

    return wrapped


if __name__ == "__main__":
    moment, _, number = sys.argv[1].partition(":")
    if moment == "after_sft":
        dpo.train.start_models = die  # type: ignore[assignment]
    elif moment == "in_step":
        dpo.runtime.engine.step = at_call(int(number), dpo.runtime.engine.step)
    elif moment == "in_evaluation":
        dpo.train.evaluate = at_call(int(number), dpo.train.evaluate)
    elif moment == "in_save":
        checkpoint.write_whole = at_call(int(number), checkpoint.write_whole)
    sys.exit(train_dpo.main(sys.argv[2:]))
