"""The frontier experiment: its lines are what theory says, its tables hold the best points, the whole of it runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import frontier
from benchmarks.frontier import Point, optimum
from benchmarks.frontier_report import best_within, reached
from tests.invariants.jobs import without_drawings

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_optimum_is_the_tilted_reference_worked_by_hand():
    # Rewards 0 and 1 with equal probability: pi* gives the 1 the probability s = sigmoid(1 / beta).
    kl, reward = optimum(np.array([[0.0, 1.0], [1.0, 0.0]]), beta=0.5)
    s = 1 / (1 + math.exp(-2))
    assert reward == pytest.approx(s)
    assert kl == pytest.approx(s * math.log(2 * s) + (1 - s) * math.log(2 * (1 - s)))


def test_a_weak_pull_leaves_the_reference_and_a_strong_one_takes_its_best_answer():
    table = np.random.default_rng(0).normal(size=(50, 8))
    assert optimum(table, 1e6) == pytest.approx((0, table.mean()), abs=1e-5)
    assert optimum(table, 1e-3) == pytest.approx((math.log(8), table.max(axis=1).mean()), abs=1e-2)


def test_the_table_takes_the_best_point_within_the_budget():
    points = [Point("DPO", b, 1, reward, 0.1, kl, 0.1, 1.0) for b, kl, reward in ((1, 0.5, 1.0), (2, 1.5, 3.0))]
    points.append(Point("IPO", 1, 1, 9.0, 0.1, 0.1, 0.1, 1.0))
    assert best_within(points, "DPO", 1.0) is points[0]
    assert best_within(points, "DPO", 2.0) is points[1]
    assert best_within(points, "DPO", 0.1) is None
    assert reached([(2.0, 4.0), (0.0, 0.0)], 0.5) == 1.0 and reached([(0.0, 0.0), (2.0, 4.0)], 3.0) is None


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frontier")
    shutil.copy(DOCS / "frontier.md", folder)
    argv = ["--quick", "--methods", "DPO", "--work", str(folder / "work"), "--docs", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        without_drawings(patch.setattr)
        assert frontier.main(argv) == 0
    return folder


def test_the_experiment_trains_on_answers_of_the_reference_labelled_by_the_true_reward(quick):
    rows = [json.loads(line) for line in (quick / "work/pairs.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        scored = []
        for side in ("chosen", "rejected"):
            start = row[side].rindex("\n\nAssistant:") + len("\n\nAssistant:")
            scored.append(frontier.example.reward(row[side][:start], row[side][start:]))
        assert scored[0] > scored[1]


def test_the_experiment_fills_its_page(quick):
    points = json.loads((quick / "work/points.json").read_text())["points"]
    assert [(p["method"], p["step"]) for p in points] == [("SFT", 0), ("DPO", 1), ("DPO", 2)]
    assert points[0]["kl"] == 0 and points[2]["kl"] != points[1]["kl"]
    text = (quick / "frontier.md").read_text()
    assert f"| DPO | 0.1 | 2 | {points[2]['kl']:.2f}" in text
    assert (quick / "frontier.png").stat().st_size > 10_000
