"""status.json: how a run stands, for whoever started it; torchrun swallows exit codes.

    {"state": "preempted", "step": 200, "place": "in step 200, micro-batch 3", "reason": "SIGUSR1 received", ...}

Where DPO_STATUS_FILE is set a copy goes there, so that a batch script need not know the run directory.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from dpo.runtime.files import write_whole

State = Literal["running", "preempted", "failed", "finished"]


def write_status(run: Path, state: State, step: int | None = None, reason: str = "", place: str = "") -> None:
    """Say how the run stands; called on rank 0.

    Args:
        run: The run directory; only the copy is written where there is none yet.
        state: What it is in.
        step: Optimizer steps of DPO that are safe on disk; None keeps what the file says.
        reason: Of a stop, one line.
        place: Where the run had come to, whatever the stage: another one later means that it gets on.
    """
    if step is None:
        step = read_status(run).get("step", 0)
    text = json.dumps(
        {
            "state": state,
            "step": step,
            "place": place,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
        }
    )
    if run.is_dir():
        write_whole(run / "status.json", text)
    if copy := os.environ.get("DPO_STATUS_FILE"):
        write_whole(Path(copy), text)


def read_status(run: Path) -> dict[str, Any]:
    """What status.json says; empty if there is none."""
    try:
        return json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
