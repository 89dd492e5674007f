"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total: int, peak: float, schedule: str, warmup_steps: float) -> float:
    """Linear warm-up, then decay to zero just after the last step.

    Args:
        step: Optimizer step, counted from 0.
        total: Steps of the run, >= 1.
        peak: Learning rate at the end of the warm-up.
        schedule: cosine, linear or constant.
        warmup_steps: Steps of warm-up; below 1: the share of `total`.
    Returns:
        The rate of this step. As in transformers, step 0 of a warm-up has rate 0 only in theory: the k-th warm-up
        step of w uses (k + 1) / (w + 1) of the peak, so that no step is lost.
    """
    warmup = math.ceil(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
