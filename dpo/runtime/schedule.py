"""What a step's number alone decides, so that a resumed run needs no scheduler state: learning rate, what is due."""

from __future__ import annotations

import math


def due(step: int, every: int | str, steps_per_epoch: int) -> bool:
    """Whether something that happens every `every` steps, or every "epoch", is due after a step; never at "end"."""
    return every != "end" and step % (steps_per_epoch if every == "epoch" else int(every)) == 0


def learning_rate(step: int, *, total: int, peak: float, schedule: str, warmup_steps: float) -> float:
    """Linear warm-up, then decay to zero just after the last step.

    Args:
        step: Optimizer step, counted from 0.
        total: Steps of the run, >= 1.
        peak: Learning rate at the end of the warm-up.
        schedule: cosine, linear or constant.
        warmup_steps: Steps of warm-up; below 1: the share of `total`.
    Returns:
        The rate of this step. The k-th warm-up step of w uses (k + 1) / (w + 1) of the peak: none is lost, as step 0 is
        in transformers, where its rate is 0.
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
