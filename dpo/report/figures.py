"""Numbers -> pictures: training_metrics.png, and the SVG charts of report.html.

A chart holds no text of the user's: names stand in the page's own legend, escaped there. Its colours are CSS variables
of the page, so that it follows light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo.report.content import MAIN

MAX_POINTS = 300
"""Of a curve in the report; longer ones show means over neighbouring points, and their range as a band."""
NUM_COLOURS = 8
_INK, _GRID, _CURVES = "#fe0100", "#fe0200", "#fe03{:02x}"
_STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _GRID, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: For the legend.
        x, y: (n,) each.
        colour: 0 to NUM_COLOURS - 1.
        dashed: Dashed, else solid.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def series(lines: Sequence[dict[str, Any]], name: str, axis: str = "step") -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it has a value."""
    points = [(line[axis], line[name]) for line in lines if axis in line and isinstance(line.get(name), int | float)]
    return [p[0] for p in points], [p[1] for p in points]


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, least and greatest y over runs of neighbouring points; at most MAX_POINTS of them."""
    x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
    starts = np.linspace(0, len(x), min(MAX_POINTS, len(x)), endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(x)))
    mean = np.add.reduceat(y, starts) / sizes
    return np.add.reduceat(x, starts) / sizes, mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def line_chart(curves: Sequence[Curve], x_label: str = "step", *, log: bool = False) -> str:
    """Draw curves.

    Args:
        curves: At least one point in all.
        x_label: Of ours, no text of the user's.
        log: Logarithmic y axis, where all values are positive.
    Returns:
        An <svg> element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axis = _figure()
        for curve in curves:
            if not len(curve.x):
                continue
            x, mean, least, greatest = _thinned(curve)
            colour = _CURVES.format(curve.colour % NUM_COLOURS)
            if len(x) < len(curve.x):
                axis.fill_between(x, least, greatest, color=colour, alpha=0.18, linewidth=0)
            marker = "o" if len(x) <= 40 else None
            axis.plot(x, mean, color=colour, linestyle="--" if curve.dashed else "-", linewidth=1.4, marker=marker,
                      markersize=2.5)  # fmt: skip
        if log and all(value > 0 for curve in curves for value in curve.y):
            axis.set_yscale("log")
        axis.set_xlabel(x_label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def histogram(groups: Sequence[Curve], x_label: str) -> str:
    """Draw the distribution of several groups over each other.

    Args:
        groups: Their y values; x is not looked at.
        x_label: Of ours.
    Returns:
        As `line_chart`.
    """
    values = np.concatenate([np.asarray(group.y, dtype=float) for group in groups])
    low, high = np.quantile(values, [0.005, 0.995])
    bins = np.linspace(low, high if high > low else low + 1, 41)
    with matplotlib.rc_context(_STYLE):
        figure, axis = _figure()
        for group in groups:
            colour = _CURVES.format(group.colour % NUM_COLOURS)
            clipped = np.clip(group.y, bins[0], bins[-1])
            axis.hist(clipped, bins, histtype="stepfilled", color=colour, alpha=0.35)
            axis.hist(clipped, bins, histtype="step", color=colour, linewidth=1.2)
        axis.axvline(0, color=_INK, linewidth=0.8)
        axis.set(xlabel=x_label, ylabel="pairs")
        return _svg(figure)


def bars(labels: Sequence[str], values: Sequence[float], x_label: str) -> str:
    """Draw shares in [0, 1] by bucket, with a line at one half.

    Args:
        labels: Of the buckets: of ours.
        values: One a label.
        x_label: Of ours.
    Returns:
        As `line_chart`.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axis = _figure()
        axis.bar(range(len(values)), values, color=_CURVES.format(0), alpha=0.75, width=0.7)
        axis.axhline(0.5, color=_INK, linewidth=0.8)
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set(xlabel=x_label, ylim=(0, 1))
        axis.grid(False, axis="x")
        return _svg(figure)


def reliability(predicted: Sequence[float], right: Sequence[float]) -> str:
    """Draw predicted confidence against the share that was right, with the diagonal of perfect calibration.

    Returns:
        As `line_chart`.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axis = _figure()
        axis.plot([0.5, 1], [0.5, 1], color=_INK, linewidth=0.8, linestyle=":")
        axis.plot(predicted, right, color=_CURVES.format(0), marker="o", markersize=3.5, linewidth=1.4)
        axis.set(xlabel="predicted: sigmoid of |margin|", ylabel="share right", ylim=(0, 1.02))
        return _svg(figure)


def _figure() -> tuple[Any, Any]:
    figure = Figure(figsize=(4.6, 2.7))
    # Fixed margins: a layout engine draws everything twice more, and that is most of the time of a report.
    figure.subplots_adjust(left=0.15, right=0.98, bottom=0.18, top=0.93)
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")
    return re.sub(r"#fe03(\w\w)", lambda found: f"var(--c{int(found[1], 16)})", svg)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, reward margin and accuracy of training and validation, and the SFT loss where there is one.

    Args:
        lines: Of metrics.jsonl.
        path: Of the PNG.
    """
    sft = [line for line in lines if "sft_loss" in line]
    figure = Figure(figsize=(5 * (len(MAIN) + bool(sft)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(MAIN) + bool(sft)))
    if sft:
        axis = axes.pop(0)
        axis.plot(*series(lines, "sft_loss", "sft_step"), label="train")
        steps, values = series(lines, "eval_sft_loss", "sft_step")
        if steps:
            axis.plot(steps, values, marker="o", label="validation")
            axis.legend()
        axis.set(title="SFT loss (nats per token)", xlabel="SFT step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for axis, (name, title) in zip(axes, MAIN, strict=True):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.plot(*series(lines, name), label="train", linewidth=1)
        steps, values = series(lines, f"eval_{name}")
        if steps:
            axis.plot(steps, values, marker="o", label="validation")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
