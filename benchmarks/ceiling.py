"""What the machine can do at best: square matrix products in the dtype of the run, in a process of its own.

On a CPU a bf16 run may multiply in fp32, so that there the faster of the two counts.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.clock import Job, main, synchronize


def run(job: Job) -> dict[str, Any]:
    """Floating-point operations per second of the best of several windows."""
    n, repeats = (8192, 20) if job.device == "cuda" else (job.options.get("size", 2048), 5)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    tried = list(dtypes) if job.device == "cpu" and job.dtype == "bf16" else [job.dtype]

    def speed(name: str, n: int, repeats: int) -> float:
        a, b = (torch.randn(n, n, device=job.device).to(dtypes[name]) for _ in range(2))
        synchronize(job.device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        synchronize(job.device)
        return 2 * n**3 * repeats / (time.perf_counter() - started)

    # A CPU without instructions for bf16 would take minutes over products that decide nothing.
    hasty = {name: max(speed(name, n // 8, 1) for _ in range(3)) for name in tried}
    tried = [name for name in tried if hasty[name] > max(hasty.values()) / 4]
    best = {name: max(speed(name, n, repeats) for _ in range(4)) for name in tried}
    fastest = max(best, key=best.__getitem__)
    return {"flops_per_second": best[fastest], "size": n, "dtype": fastest}


if __name__ == "__main__":
    main(run)
