"""Shares, buckets, calibration and differences, against values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo.report import panels
from tests.report.runs import table


def test_displacement_counts_what_fell_since_the_first_evaluation_not_since_the_reference() -> None:
    first = table(0, [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    latest = table(9, [0.0, 2.0, 0.5, 1.0], [-1.0, -1.0, 1.0, 0.0], lengths=[[2, 1], [4, 1], [5, 1], [1, 1]])
    found = panels.displacement(first, latest)
    assert (found.pairs, found.chosen_fell, found.both_fell) == (4, 0.5, 0.25)
    assert found.chosen_change == pytest.approx((-1 + 1 - 0.5 + 0) / 4)
    assert found.rejected_change == pytest.approx((-1 - 1 + 1 + 0) / 4)
    assert found.per_token == pytest.approx((-1 / 2 + 1 / 4 - 0.5 / 5) / 4)


@pytest.mark.parametrize(("fell", "pairs", "warned"), [(11, 20, True), (10, 20, False), (11, 19, False)])
def test_displacement_warns_where_most_of_enough_pairs_fell(fell: int, pairs: int, warned: bool) -> None:
    chosen = [-1.0] * fell + [1.0] * (pairs - fell)
    found = panels.displacement(table(0, np.zeros(pairs), np.zeros(pairs)), table(1, chosen, np.zeros(pairs)))
    assert found.is_warning is warned


def test_accuracy_by_length_puts_every_pair_in_one_bucket_and_counts_ties_one_half() -> None:
    values = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10.0])
    margins = np.array([1, 0, -1, 1, 1, 1, -1, -1, 1, 1.0])
    found = panels.by_length(values, margins, buckets=2)
    assert [(b.low, b.high, b.pairs, b.accuracy) for b in found] == [(1, 5, 5, 0.7), (6, 10, 5, 0.6)]
    assert found[0].label == "1 to 5"
    (one,) = panels.by_length(np.full(10, 3.0), margins)
    assert (one.label, one.pairs, one.accuracy) == ("3", 10, 0.65)


def test_the_length_panel_sees_a_policy_that_likes_length() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, (200, 2))
    difference = sizes[:, 0] - sizes[:, 1]
    biased = panels.lengths(table(3, difference / 10, np.zeros(200), sizes))
    assert biased.correlation == pytest.approx(1) and biased.is_warning
    assert biased.differences[0].accuracy == 0 and biased.differences[-1].accuracy == 1
    assert biased.chosen_is_longer == pytest.approx((difference > 0).mean() + (difference == 0).mean() / 2)
    fair = panels.lengths(table(3, rng.normal(1, 1, 200), np.zeros(200), sizes))
    assert fair.correlation is not None and abs(fair.correlation) < 0.2 and not fair.is_warning
    assert panels.lengths(table(3, [1.0] * 30, [0.0] * 30)).correlation is None


def test_calibration_is_zero_where_sigmoid_of_the_margin_is_the_share_that_is_right() -> None:
    margin = math.log(3)  # sigmoid 0.75
    margins = np.array([margin] * 15 + [-margin] * 5)
    found = panels.calibration(margins, bins=1)
    assert found.predicted == pytest.approx([0.75]) and found.right == [0.75]
    assert found.error == pytest.approx(0, abs=1e-12)
    assert panels.calibration(-margins, bins=1).error == pytest.approx(0.5)


def test_differences_mark_words_and_give_back_the_texts() -> None:
    old, new = "The box was made by Halolf.", "The box was made by Halolf, Tava. \n"
    left, right = panels.differences(old, new)
    assert "".join(text for text, _ in left) == old and "".join(text for text, _ in right) == new
    assert [text for text, own in right if own] == [", Tava", " \n"] and not any(own for _, own in left)
    assert panels.differences("same", "same") == ([("same", False)], [("same", False)])
    assert panels.differences("", "x") == ([], [("x", True)])


def test_findings_name_losses_that_are_not_finite_and_runs_that_do_not_move() -> None:
    broken = [{"step": 1, "loss": 0.7, "grad_norm": 1.0}, {"step": 2, "loss": None, "grad_norm": None}]
    found = panels.findings(broken)
    assert "first at step 2" in found[0] and "overflowed in 1 line" in found[1] and len(found) == 2
    still = [{"step": i, "loss": 0.6931, "rewards/margins": 0.0} for i in range(1, 61)]
    assert "Margins have not left 0" in panels.findings(still)[0]
    moving = [line | {"rewards/margins": 0.01} for line in still]
    assert panels.findings(moving) == [] == panels.findings([])


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ((0.69, 0.50, 0.40), False), ((0.69, 0.40, 0.405), False), ((0.69, 0.40, 0.45), True), ((0.30, 0.302), False),
        ((0.5, 1e-5, 5e-4), False),
    ],
)  # fmt: skip
def test_a_validation_loss_that_rose_again_is_told_with_the_step_of_its_lowest(losses, told) -> None:
    lines = [{"step": 10 * i, "eval_loss": v, "eval_rewards/accuracies": 0.5 + i / 10} for i, v in enumerate(losses)]
    found = panels.findings([*lines, {"step": 30, "loss": 0.1}])
    assert len(found) == told
    if told:
        assert "lowest at step 10 (0.4000, accuracy 0.6000) and has risen since (step 20: 0.4500, accuracy" in found[0]


def test_a_validation_loss_that_no_step_brought_below_the_start_is_told_so() -> None:
    lines = [{"step": 10 * i, "eval_loss": value} for i, value in enumerate((0.69, 1.2, 0.9))]
    (found,) = panels.findings(lines)
    assert found.startswith("Validation loss never fell below that of the start: 0.6900 there, 0.9000 at step 20.")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (math.nan, "-"), (0.0, "0.0000"), (0.69314718, "0.6931"), (1e-6, "1e-06"), (123456, "123,456")],
)
def test_numbers_are_shown_short(value: object, shown: str) -> None:
    assert panels.show(value) == shown


def test_an_epoch_is_the_mean_of_its_steps_beside_its_last_evaluation() -> None:
    def line(step: int, value: float | None, prefix: str = "") -> dict[str, float | None]:
        names = ("loss", "rewards/margins", "rewards/accuracies")
        return {"step": step, "epoch": step / 5} | {prefix + name: value for name in names}

    lines = [line(0, 9.0, "eval_"), line(1, 1.0), line(3, 4.0), line(5, 7.0), line(5, 8.0, "eval_")]
    lines += [line(7, 2.0), line(7, 6.0, "eval_"), line(9, None), line(10, 5.0)]
    rows = panels.by_epoch(lines)
    assert rows == [
        (0, [None, 9.0] * 3), (1, [(1 + 2 * 4 + 2 * 7) / 5, 8.0] * 3), (2, [(2 * 2 + 5) / 3, 6.0] * 3),
    ]  # fmt: skip
    torn = [line(1, 1.0), line(2, 2.0), line(4, 4.0), line(2, 3.0), line(7, 5.0)]  # joined by hand
    assert panels.by_epoch(torn)[1][1][0] == (1 + 2 + 2 * 4 + 3) / 5
    assert panels.by_epoch(lines[:5]) == [] == panels.by_epoch([{"sft_step": 1, "sft_loss": 2.0}])
