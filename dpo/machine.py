"""What a process may use of the machine that it is on."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """CPUs that this process may use: a job of a scheduler or container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
