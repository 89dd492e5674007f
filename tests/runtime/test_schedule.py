"""Learning rates by hand, of a run of ten steps with peak 1."""

from __future__ import annotations

import math

import pytest

from dpo.runtime.schedule import learning_rate


def rates(schedule: str, warmup_steps: float, total: int = 10, peak: float = 1.0) -> list[float]:
    return [
        learning_rate(step, total=total, peak=peak, schedule=schedule, warmup_steps=warmup_steps)
        for step in range(total)
    ]


def test_warm_up_rises_by_equal_parts_and_reaches_the_peak_on_the_step_after_it() -> None:
    for schedule in ("linear", "cosine", "constant"):
        assert rates(schedule, 4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_linear_falls_by_equal_parts_to_zero_just_after_the_last_step() -> None:
    assert rates("linear", 0) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates("linear", 5)[5:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert learning_rate(10, total=10, peak=1.0, schedule="linear", warmup_steps=5) == 0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    falling = rates("cosine", 2)
    assert falling[2] == 1 and falling[6] == pytest.approx(0.5)
    assert falling[4] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert falling[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


def test_constant_stays_at_the_peak() -> None:
    assert rates("constant", 0) == [1] * 10


def test_a_warm_up_below_one_is_a_share_of_all_steps_rounded_up() -> None:
    assert rates("linear", 0.25) == rates("linear", 3)
    assert rates("linear", 1) == pytest.approx([0.5, *(1 - i / 9 for i in range(9))])


def test_a_warm_up_of_the_whole_run_and_more_never_divides_by_zero() -> None:
    assert rates("cosine", 10) == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates("linear", 40)[-1] == pytest.approx(10 / 41)
    assert rates("cosine", 0, total=1) == [1]


def test_the_peak_scales_everything() -> None:
    assert rates("cosine", 3, peak=5e-7) == pytest.approx([5e-7 * rate for rate in rates("cosine", 3)])
