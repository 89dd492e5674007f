"""What a measured process is asked to do, and the clock that it runs against.

Every measured process reads a `Job`, runs its steps, and hands back what its `Clock` saw. Only the system's own
training code lies between two ticks of that clock: data loader, forward, backward, clipping, optimizer, logging.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Job:
    """One measured process.

    Attributes:
        policy: Folder of the starting weights and the tokenizer.
        rows: JSON Lines of the same pairs as text, for the system that reads its own data.
        pairs: JSON file of the token ids: a list of {prompt_ids, chosen_ids, rejected_ids}.
        token_cache: Where the rows' ids already lie.
        folder: Empty; the process may write there.
        max_length: As the rows are cut.
        batch: Pairs per optimizer step.
        warmup, steps: Optimizer steps before the clock starts, and under it.
        dtype: bf16 or fp32, of the products; master weights are fp32.
        device: cpu or cuda.
        lr, beta: The same everywhere; the learning rate is constant.
        options: What tells one system of a module from another.
    """

    policy: str
    rows: str
    pairs: str
    token_cache: str
    folder: str
    max_length: int
    batch: int
    warmup: int
    steps: int
    dtype: str
    device: str
    lr: float
    beta: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the process."""
        return self.warmup + self.steps

    def to_json(self) -> str:
        """As its process reads it."""
        return json.dumps(asdict(self))

    def read_pairs(self) -> list[dict[str, list[int]]]:
        """The token ids, in the order of training."""
        return json.loads(Path(self.pairs).read_text())


class Clock:
    """What a measured process shows for itself: a time and a loss per optimizer step, and its memory.

    Args:
        job: For the bounds of the timed window.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stamps: list[float] = []
        self.cpu_stamps: list[float] = []
        self.losses: list[Any] = []
        self.build_seconds: float | None = None
        self.tokens: int | None = None
        self.peak_gib = 0.0

    def tick(self, loss: Any) -> None:
        """Note that a step is done; the GPU is waited for at the ends of the timed window alone.

        Args:
            loss: Mean over the step's pairs before its update; a number or a scalar tensor.
        """
        done = len(self.stamps) + 1
        if done in (self.job.warmup, self.job.total_steps):
            synchronize(self.job.device)
        if done == self.job.warmup and self.job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of what was tried or scored before the first step
        self.stamps.append(time.perf_counter())
        self.cpu_stamps.append(time.process_time())
        self.losses.append(loss)
        if done == self.job.total_steps:
            self.peak_gib = peak_memory_gib(self.job.device)

    def result(self) -> dict[str, Any]:
        """Plain values for the parent process.

        Raises:
            RuntimeError: If the process did another number of steps than it was asked for.
        """
        if len(self.stamps) != self.job.total_steps:
            raise RuntimeError(f"{len(self.stamps)} steps were seen, not {self.job.total_steps}")
        first = self.job.warmup - 1
        seconds = self.stamps[-1] - self.stamps[first]
        return {
            "losses": [float(loss) for loss in self.losses],
            "seconds": seconds,
            "cores_used": (self.cpu_stamps[-1] - self.cpu_stamps[first]) / seconds,
            "step_seconds": np.diff(self.stamps).tolist(),
            "peak_gib": self.peak_gib,
            "build_seconds": self.build_seconds,
            "tokens": self.tokens,
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
        }


def synchronize(device: str) -> None:
    """Wait for a GPU; nothing to do on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory_gib(device: str) -> float:
    """Most memory so far: allocated tensors on a GPU, the process's resident memory on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main(run: Callable[[Job], dict[str, Any]]) -> None:
    """The door of a measured process: argv is the file of its Job and the file for its result."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    # cuDNN's attention makes a plan for every new length: off in ours, and in all systems that are tuned.
    torch.backends.cuda.enable_cudnn_sdp(not job.options)
    Path(sys.argv[2]).write_text(json.dumps(run(job)))
