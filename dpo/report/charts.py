"""Lines of metrics.jsonl -> the charts of the report, for one run or for several on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dpo.report.content import Content
from dpo.report.figures import NUM_COLOURS, Curve, line_chart, series

CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("Loss", (("loss", ""),), False),
    ("Reward margin", (("rewards/margins", ""),), False),
    ("Accuracy", (("rewards/accuracies", ""),), False),
    ("Log-prob of a completion, nats", (("logps/chosen", "chosen"), ("logps/rejected", "rejected")), False),
    ("Reward", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), False),
    ("Log-ratio of the policy's answers, nats", (("samples/kl", ""),), False),
    ("Answers, tokens", (("samples/policy_tokens", "policy"), ("samples/reference_tokens", "reference")), False),
    ("Gradient norm, before clipping", (("grad_norm", ""),), True),
    ("Learning rate", (("learning_rate", ""),), False),
    ("Throughput, pairs a second", (("perf/pairs_per_second", ""),), False),
    ("Peak memory, GiB", (("perf/peak_memory_gib", ""),), False),
    ("SFT loss, nats a token", (("sft_loss", ""),), False),
)  # fmt: skip
"""Title, metrics with what tells them apart, and whether the axis is logarithmic."""
MAX_OTHERS = 12
NOT_DRAWN = ("step", "epoch", "num_tokens", "sft_step", "sft_epoch", "perf/tokens_per_second", "perf/padding_fraction")


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        title: Above it; may hold the name of a metric.
        legend: Its curves; their names may be the user's.
        svg: The picture.
    """

    title: str
    legend: tuple[Curve, ...]
    svg: Markup


def main_charts(runs: Sequence[Content]) -> list[Chart]:
    """The charts that every report has, as far as there are values."""
    made = []
    for title, metrics, log in CHARTS:
        if len(runs) > 1 and len(metrics) > 1:
            for metric, part in metrics:
                made.append(_chart(f"{title}: {part}", ((metric, ""),), log, runs))
        else:
            made.append(_chart(title, metrics, log, runs))
    return [chart for chart in made if chart is not None]


def other_charts(runs: Sequence[Content]) -> list[Chart]:
    """Charts of metrics that this program does not know by name, as a newer loss may write them."""
    known = {name for _, metrics, _ in CHARTS for name, _ in metrics} | set(NOT_DRAWN)
    names = {name.removeprefix("eval_") for run in runs for line in run.lines for name in line}
    made = (_chart(name, ((name, ""),), False, runs) for name in sorted(names - known)[:MAX_OTHERS])
    return [chart for chart in made if chart is not None]


def _chart(title: str, metrics: Sequence[tuple[str, str]], log: bool, runs: Sequence[Content]) -> Chart | None:
    curves = []
    axis = "sft_step" if metrics[0][0].startswith("sft_") else "step"
    for index, run in enumerate(runs):
        lines = [line for line in run.lines if axis in line]
        for place, (metric, part) in enumerate(metrics):
            for kind, name in (("train", metric), ("validation", f"eval_{metric}")):
                x, y = series(lines, name, axis)
                if not x:
                    continue
                label = " ".join(filter(None, (run.name if len(runs) > 1 else "", part, kind)))
                colour = index if len(runs) > 1 else 2 * place + (kind == "validation")
                curves.append(Curve(label, x, y, colour % NUM_COLOURS, dashed=kind == "validation"))
    if not curves:
        return None
    if metrics[0][0].startswith("samples/"):
        curves = [Curve(c.name.replace(" train", "").replace("train", "answers"), c.x, c.y, c.colour) for c in curves]
    return Chart(title, tuple(curves), Markup(line_chart(curves, "SFT step" if axis != "step" else "step", log=log)))
