"""Points of benchmarks/frontier.py -> the figure and the tables of docs/frontier.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report import table

BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Nats an answer."""
Lines = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Point:
    """One policy.

    Attributes:
        method, strength, step: What it was trained by, and for how many optimizer steps.
        reward: Mean ground-truth reward of its answers; reward_error: standard error.
        kl: Nats an answer; kl_error: standard error.
        parsed: Share of its answers that are sentences of the world.
    """

    method: str
    strength: float
    step: int
    reward: float
    reward_error: float
    kl: float
    kl_error: float
    parsed: float


def _methods(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.method for point in points))


def best_within(points: Sequence[Point], method: str, budget: float) -> Point | None:
    """The point of a method with the highest reward among those of at most this KL."""
    fits = [point for point in points if point.method == method and point.kl <= budget]
    return max(fits, key=lambda point: point.reward, default=None)


def reached(line: Sequence[tuple[float, float]], budget: float) -> float | None:
    """Reward of a line at a KL, between its points; None outside of them."""
    ordered = sorted(line)
    kls = [kl for kl, _ in ordered]
    return float(np.interp(budget, kls, [reward for _, reward in ordered])) if kls[0] <= budget <= kls[-1] else None


def tables(points: Sequence[Point], lines: Lines, pairs: int) -> str:
    """The best reward of each method within KL budgets, and all points."""
    rows = []
    for method in _methods(points):
        if method == "SFT":
            continue
        cells = [best_within(points, method, budget) for budget in BUDGETS]
        rows.append([method, *("-" if p is None else f"{p.reward:.2f} ± {p.reward_error:.2f}" for p in cells)])
    for name, line in lines.items():
        found = [reached(line, budget) for budget in BUDGETS]
        rows.append([name, *("-" if value is None else f"{value:.2f}" for value in found)])
    start = next(point for point in points if point.method == "SFT")
    every = [
        [p.method, f"{p.strength:g}", str(p.step), f"{p.kl:.2f} ± {p.kl_error:.2f}",
         f"{p.reward:.2f} ± {p.reward_error:.2f}", f"{p.parsed:.0%}"]
        for p in points
    ]  # fmt: skip
    earned = f"{start.reward:.2f} ± {start.reward_error:.2f}"
    return (
        f"The reference (SFT) earns {earned}; the methods train on {pairs:,} pairs of its own answers.\n\n"
        + table(["best reward at KL of at most", *(f"{budget:g} nats" for budget in BUDGETS)], rows)
        + "\n\n<details><summary>All points</summary>\n\n"
        + table(["method", "strength", "steps", "KL", "reward", "parse"], every)
        + "\n\n</details>"
    )


def figure(points: Sequence[Point], lines: Lines, path: Path) -> None:
    """Draw reward over KL; every policy a dot with its standard errors."""
    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    for name, line in lines.items():
        kls, rewards = zip(*sorted(line), strict=True)
        axes.plot(kls, rewards, "--" if name == "Optimum" else ":", color="0.4", label=name)
    for number, method in enumerate(_methods(points)):
        mine = [point for point in points if point.method == method]
        axes.errorbar(
            [p.kl for p in mine], [p.reward for p in mine], xerr=[p.kl_error for p in mine],
            yerr=[p.reward_error for p in mine], fmt="osD^v<>P"[number % 8], markersize=5, linewidth=0.8,
            linestyle="none", label=method,
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.05)
    axes.set(xlabel="KL of policy from reference, nats an answer", ylabel="ground-truth reward")
    axes.grid(linewidth=0.4)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=120)
