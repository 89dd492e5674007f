"""What the first and the latest evaluation said of every validation pair.

    validation_pairs.npz    first, latest: one row of COLUMNS a pair, by pair id; first_step, latest_step
    worst_pairs.jsonl       the pairs of the latest evaluation whose margin is most wrong, with their texts
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.runtime.files import read_records, write_records, write_whole

COLUMNS = (
    "pair_id", "loss", "chosen_reward", "rejected_reward", "policy_chosen_logps", "policy_rejected_logps",
    "reference_chosen_logps", "reference_rejected_logps", "chosen_length", "rejected_length",
)  # fmt: skip
"""Of the array that an evaluation gives: rewards are beta * log-ratio, log-probs sums in nats (NaN, in JSON null, of a
reference where the loss has none), lengths tokens."""

NUM_WORST = 12


@dataclass(frozen=True)
class PairTable:
    """One evaluation, pair by pair.

    Attributes:
        step: Optimizer steps done.
        values: (n, len(COLUMNS)) fp64, by pair id.
    """

    step: int
    values: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        """One column. (n,) fp64."""
        return self.values[:, COLUMNS.index(name)]

    @property
    def margins(self) -> np.ndarray:
        """Chosen minus rejected reward. (n,) fp64."""
        return self["chosen_reward"] - self["rejected_reward"]


def write_pairs(run: Path, latest: PairTable, text: Callable[[int], dict[str, Any]]) -> None:
    """Keep an evaluation as the latest, and as the first where it is the one before the first step.

    Args:
        run: The run directory.
        latest: The evaluation.
        text: Pair id -> origin (its row), prompt, chosen and rejected, as the data has them.
    """
    found = read_pairs(run) if latest.step > 0 else None
    first = found[0] if found is not None and len(found[0].values) == len(latest.values) else latest
    packed = io.BytesIO()
    arrays: dict[str, Any] = {"first": first.values, "latest": latest.values, "columns": np.array(COLUMNS)}
    steps: dict[str, Any] = {"first_step": np.array(first.step), "latest_step": np.array(latest.step)}
    np.savez_compressed(packed, **arrays, **steps)
    write_whole(run / "validation_pairs.npz", packed.getvalue())
    worst = [int(i) for i in np.argsort(latest.margins, kind="stable")[:NUM_WORST] if latest.margins[i] < 0]
    rows = []
    for index in worst:
        values = {name: float(latest[name][index]) for name in COLUMNS[1:]}
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        about = {"step": latest.step, "margin": float(latest.margins[index])}
        rows.append(about | numbers | text(int(latest["pair_id"][index])))
    write_records(run / "worst_pairs.jsonl", rows)


def read_pairs(run: Path) -> tuple[PairTable, PairTable] | None:
    """The first and the latest evaluation of a run; None where it has none that can be read."""
    try:
        with np.load(io.BytesIO((run / "validation_pairs.npz").read_bytes())) as stored:
            if tuple(stored["columns"]) != COLUMNS:
                return None
            return tuple(PairTable(int(stored[f"{n}_step"]), stored[n]) for n in ("first", "latest"))  # type: ignore
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def read_worst(run: Path) -> list[dict[str, Any]]:
    """The rows of worst_pairs.jsonl, most wrong first."""
    return read_records(run / "worst_pairs.jsonl")[0]
