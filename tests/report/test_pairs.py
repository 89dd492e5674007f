"""The first and the latest evaluation are kept pair by pair, and the worst pairs with their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.report.pairs import COLUMNS, NUM_WORST, read_pairs, read_worst, write_pairs
from tests.report.runs import table


def text(pair_id: int) -> dict[str, Any]:
    return {"origin": f"row {pair_id + 1}", "prompt": f"p{pair_id}", "chosen": "c", "rejected": "r"}


def test_first_and_latest_are_kept_and_nothing_between(tmp_path: Path) -> None:
    for step, value in ((0, 0.0), (5, 1.0), (9, 2.0)):
        write_pairs(tmp_path, table(step, [value, -value], [0.0, 0.0]), text)
    found = read_pairs(tmp_path)
    assert found is not None
    first, latest = found
    assert (first.step, latest.step) == (0, 9)
    assert first.margins.tolist() == [0, 0] and latest.margins.tolist() == [2, -2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["validation_pairs.npz", "worst_pairs.jsonl"]


def test_a_run_that_starts_anew_forgets_the_old_first(tmp_path: Path) -> None:
    write_pairs(tmp_path, table(0, [1.0], [0.0]), text)
    write_pairs(tmp_path, table(4, [2.0], [0.0]), text)
    write_pairs(tmp_path, table(0, [0.0], [0.0]), text)
    found = read_pairs(tmp_path)
    assert found is not None and found[0].margins.tolist() == [0] and found[1].step == 0


def test_another_validation_set_starts_its_own_comparison(tmp_path: Path) -> None:
    write_pairs(tmp_path, table(0, [1.0], [0.0]), text)
    write_pairs(tmp_path, table(4, [2.0, 3.0], [0.0, 0.0]), text)
    found = read_pairs(tmp_path)
    assert found is not None and (found[0].step, len(found[0].values)) == (4, 2)


def test_the_worst_pairs_are_those_of_negative_margin_most_wrong_first(tmp_path: Path) -> None:
    margins = np.linspace(-3, 3, 41)
    write_pairs(tmp_path, table(7, margins, np.zeros(41)), text)
    rows = read_worst(tmp_path)
    assert len(rows) == NUM_WORST and [row["prompt"] for row in rows] == [f"p{i}" for i in range(NUM_WORST)]
    assert rows[0]["margin"] == pytest.approx(-3) and rows[0]["step"] == 7 and rows[0]["origin"] == "row 1"
    assert rows[0].keys() == {"step", "margin", "origin", "prompt", "chosen", "rejected", *COLUMNS[1:]}
    write_pairs(tmp_path, table(8, np.abs(margins), np.zeros(41)), text)
    assert read_worst(tmp_path) == []


def test_what_no_reference_has_said_is_null_and_not_zero(tmp_path: Path) -> None:
    evaluated = table(3, [-1.0], [0.0])
    evaluated.values[:, COLUMNS.index("reference_chosen_logps")] = np.nan
    write_pairs(tmp_path, evaluated, text)
    (row,) = read_worst(tmp_path)
    assert row["reference_chosen_logps"] is None and row["reference_rejected_logps"] == -20


def test_what_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    assert read_pairs(tmp_path) is None and read_worst(tmp_path) == []
    write_pairs(tmp_path, table(0, [1.0], [0.0]), text)
    whole = (tmp_path / "validation_pairs.npz").read_bytes()
    for spoilt in (b"", b"no zip", whole[: len(whole) // 2]):
        (tmp_path / "validation_pairs.npz").write_bytes(spoilt)
        assert read_pairs(tmp_path) is None
