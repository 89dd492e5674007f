"""What the pairs of an evaluation and the answers of the models say: shares, buckets, calibration, differences.

Pure functions of arrays and texts. Legend: n pairs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.report.content import MAIN
from dpo.report.pairs import PairTable

MANY_FELL = 0.5
STRONG_CORRELATION = 0.3
WORSE = 0.02
"""Share by which a validation loss above its lowest is worth a word."""
MIN_PAIRS = 20
"""Fewer pairs than this raise no warning: their shares say little."""


@dataclass(frozen=True)
class Displacement:
    """How the log-probs of validation pairs moved from the first evaluation to the latest.

    Attributes:
        pairs: n.
        chosen_fell, both_fell: Shares of pairs.
        chosen_change, rejected_change: Mean change of the summed log-prob, nats.
        per_token: Mean change of the chosen log-prob per token, nats.
    """

    pairs: int
    chosen_fell: float
    both_fell: float
    chosen_change: float
    rejected_change: float
    per_token: float

    @property
    def is_warning(self) -> bool:
        """Whether most chosen completions became less likely."""
        return self.pairs >= MIN_PAIRS and self.chosen_fell > MANY_FELL


def changes(first: PairTable, latest: PairTable) -> tuple[np.ndarray, np.ndarray]:
    """Change of the policy's summed log-prob of chosen and rejected, nats. (n,) each."""
    names = ("policy_chosen_logps", "policy_rejected_logps")
    chosen, rejected = (latest[name] - first[name] for name in names)
    return chosen, rejected


def displacement(first: PairTable, latest: PairTable) -> Displacement:
    """Compare two evaluations of the same pairs.

    Source:
        Razin et al. 2024, arXiv:2410.08847: likelihood displacement.
    """
    chosen, rejected = changes(first, latest)
    return Displacement(
        len(chosen), float((chosen < 0).mean()), float(((chosen < 0) & (rejected < 0)).mean()), float(chosen.mean()),
        float(rejected.mean()), float((chosen / latest["chosen_length"]).mean()),
    )  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """Pairs whose lengths lie together.

    Attributes:
        low, high: Least and greatest value in it, tokens.
        pairs: How many.
        accuracy: Share with a positive margin, a tie counting one half.
    """

    low: int
    high: int
    pairs: int
    accuracy: float

    @property
    def label(self) -> str:
        """low to high."""
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"


def accuracies(margins: np.ndarray) -> np.ndarray:
    """1 for a positive margin, 0.5 for a tie, 0 for a negative one. (n,)"""
    return (margins > 0) + 0.5 * (margins == 0)


def with_error(values: np.ndarray, sign: str = "") -> str:
    """The mean of (n,) values and its standard error, where there are two at least.

    Args:
        values: One a pair.
        sign: "+" to show that of a positive mean too.
    """
    mean = f"{values.mean():{sign}.4f}"
    return f"{mean} ± {values.std(ddof=1) / math.sqrt(len(values)):.4f}" if len(values) > 1 else mean


def by_length(values: np.ndarray, margins: np.ndarray, buckets: int = 5) -> list[Bucket]:
    """Accuracy in buckets of about equally many pairs; equal values share a bucket.

    Args:
        values: (n,) tokens.
        margins: (n,).
        buckets: At most so many.
    """
    edges = np.unique(np.quantile(values, np.linspace(0, 1, buckets + 1)))
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
    right = accuracies(margins)
    found = []
    for index in np.unique(place):
        inside = place == index
        low, high = int(values[inside].min()), int(values[inside].max())
        found.append(Bucket(low, high, int(inside.sum()), float(right[inside].mean())))
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r; None where one of the two does not vary."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True)
class Lengths:
    """How margins and lengths hang together.

    Attributes:
        differences: Buckets of chosen minus rejected length.
        longest: Buckets of the longer completion's length.
        correlation: Of margin and chosen minus rejected length.
        chosen_is_longer: Share of pairs, a tie counting one half: what a preference for length would score.
    """

    differences: list[Bucket]
    longest: list[Bucket]
    correlation: float | None
    chosen_is_longer: float

    @property
    def is_warning(self) -> bool:
        """Whether the margin follows the length difference."""
        pairs = sum(bucket.pairs for bucket in self.differences)
        return pairs >= MIN_PAIRS and self.correlation is not None and abs(self.correlation) > STRONG_CORRELATION


def lengths(latest: PairTable) -> Lengths:
    """Look for a length bias in an evaluation.

    Source:
        Park et al. 2024, arXiv:2403.19159: DPO and length.
    """
    difference = latest["chosen_length"] - latest["rejected_length"]
    longest = np.maximum(latest["chosen_length"], latest["rejected_length"])
    return Lengths(
        by_length(difference, latest.margins), by_length(longest, latest.margins),
        correlation(latest.margins, difference), float(accuracies(difference).mean()),
    )  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Predicted confidence against what was right, in bins of about equally many pairs.

    Attributes:
        predicted, right: One value a bin.
        error: Expected calibration error: mean over pairs of the bins' |predicted - right|.
    """

    predicted: list[float]
    right: list[float]
    error: float


def calibration(margins: np.ndarray, bins: int = 10) -> Calibration:
    """Read a margin as a probability and see how often it is right.

    Under Bradley-Terry the policy prefers the answer with the higher implicit reward with probability
    sigmoid(|margin|); it is right where that is the chosen one, a tie one half.

    Args:
        margins: (n,), rewards' difference, beta included.
        bins: At most so many.
    Source:
        Guo et al. 2017, arXiv:1706.04599: expected calibration error.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(1, len(order) // 5))) if len(part)]
    predicted = [float(confidence[part].mean()) for part in parts]
    right = [float(accuracies(margins[part]).mean()) for part in parts]
    gaps = [abs(p - r) * len(part) for p, r, part in zip(predicted, right, parts, strict=True)]
    return Calibration(predicted, right, sum(gaps) / len(order))


def differences(old: str, new: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Mark by words what two texts do not share.

    Returns:
        The pieces of either text, in order, and whether each is its own alone.
    """
    before, after = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (old, new))
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        left.append(("".join(before[i:j]), kind != "equal"))
        right.append(("".join(after[k:m]), kind != "equal"))
    return [p for p in left if p[0]], [p for p in right if p[0]]


def findings(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What the curves say at once: losses that are not finite, a run that does not move, or one past its best."""
    found = []
    training = [line for line in lines if "loss" in line]
    broken = [line["step"] for line in training if line["loss"] is None]
    if broken:
        found.append(f"The loss is not finite in {len(broken)} line(s), first at step {broken[0]}.")
    skipped = sum(line.get("grad_norm", 0) is None for line in training)
    if skipped:
        found.append(f"The gradient overflowed in {skipped} line(s): under fp16 such a step is skipped.")
    margins = [line["rewards/margins"] for line in training if isinstance(line.get("rewards/margins"), float)]
    if len(margins) >= 50 and max(map(abs, margins[-10:])) < 1e-4:
        found.append(
            "Margins have not left 0: the policy does not move. Look at the learning rate, at beta, and whether its"
            " weights are trained at all."
        )
    return found + _past_its_best(lines)


def _past_its_best(lines: Sequence[dict[str, Any]]) -> list[str]:
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    if not evaluated:
        return []
    best, last = min(evaluated, key=lambda line: line["eval_loss"]), evaluated[-1]
    if last["eval_loss"] - best["eval_loss"] <= max(WORSE * abs(best["eval_loss"]), 1e-3):
        return []
    if best["step"] == 0:
        return [
            f"Validation loss never fell below that of the start: {show(best['eval_loss'])} there,"
            f" {show(last['eval_loss'])} at step {last['step']}. Try a lower optim.lr or a larger loss.beta, and look"
            " at the labels."
        ]
    then, now = (f"{show(at['eval_loss'])}, accuracy {show(at.get('eval_rewards/accuracies'))}" for at in (best, last))
    return [
        f"Validation loss was lowest at step {best['step']} ({then}) and has risen since (step {last['step']}: {now})."
        " Fewer epochs, a lower optim.lr or a larger loss.beta keep a policy nearer to its best;"
        " `python -m dpo export RUN --checkpoint best` takes the saved one of highest accuracy."
    ]


def by_epoch(lines: Sequence[dict[str, Any]]) -> list[tuple[int, list[float | None]]]:
    """Training and validation epoch by epoch; nothing while a run is in its first.

    Args:
        lines: Of metrics.jsonl.
    Returns:
        Epoch (0: the evaluation at the start), and for each metric of MAIN its training value, then its validation
        value. The former is the mean of the lines of the epoch, each for the steps that it tells of; a line that
        reaches into an epoch counts there as a whole. The latter is of the last evaluation. None for what is missing.
    """
    lines = [line for line in lines if "epoch" in line]
    training = [line for line in lines if "loss" in line]
    last = math.ceil(max((line["epoch"] for line in training), default=0))
    before = [0, *(line["step"] for line in training)]
    told = [(line, max(1, line["step"] - start)) for line, start in zip(training, before, strict=False)]
    rows = []
    for epoch in range(last + 1 if last > 1 else 0):
        own = [(line, steps) for line, steps in told if math.ceil(line["epoch"]) == epoch]
        evaluated = [line for line in lines if "eval_loss" in line and math.ceil(line["epoch"]) == epoch]
        values: list[float | None] = []
        for name, _ in MAIN:
            known = [(line[name], steps) for line, steps in own if line.get(name) is not None]
            counted = sum(steps for _, steps in known)
            values.append(sum(value * steps for value, steps in known) / counted if counted else None)
            values.append(evaluated[-1].get(f"eval_{name}") if evaluated else None)
        rows.append((epoch, values))
    return rows


def show(value: Any) -> str:
    """A number as the page writes it; a dash for what is missing or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
