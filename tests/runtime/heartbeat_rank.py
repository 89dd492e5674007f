"""A rank that does nothing but beat; started by torchrun.

    tests/runtime/heartbeat_rank.py RUN_DIRECTORY TIMEOUT {stopped|stuck} RANK

Rank 0 is busy outside of a step for longer than the time-out; in the next step the rank in question stops as a whole or
sleeps without end, and the other waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from dpo.runtime import distributed, heartbeat
from dpo.runtime.status import write_status


def main(run: Path, timeout: int, how: str, which: int) -> None:
    """Be one rank."""
    world = distributed.start()
    with heartbeat.watching(world, run, timeout):
        if world.is_main:
            write_status(run, "running", 3)
        for step in (1, 2, 3):
            heartbeat.at(f"in step {step}, micro-batch 1", in_step=True)
            if step == 3 and world.rank == which:
                time.sleep(timeout / 2)  # until its note is out
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)
            if step == 2 and world.is_main:
                heartbeat.at("writing a checkpoint")
                time.sleep(1.5 * timeout)
            heartbeat.at(f"at the end of step {step}, asking the others", in_step=True)
            distributed.agree(None)
            heartbeat.at(f"after step {step}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
