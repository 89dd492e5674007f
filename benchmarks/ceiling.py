"""What the machine can do at best: square matrix products in the dtype of the run, in a process of its own."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.clock import Job, main, synchronize


def run(job: Job) -> dict[str, Any]:
    """Floating-point operations per second of the best of several windows."""
    n, repeats = (8192, 20) if job.device == "cuda" else (job.options.get("size", 2048), 5)
    dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=job.device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(4):
        synchronize(job.device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        synchronize(job.device)
        best = max(best, 2 * n**3 * repeats / (time.perf_counter() - started))
    return {"flops_per_second": best, "size": n}


if __name__ == "__main__":
    main(run)
