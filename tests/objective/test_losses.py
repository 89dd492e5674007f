"""Losses against values worked by hand, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from dpo.objective.losses import make_loss, start_loss
from dpo.objective.metrics import NAMES, averages, sums
from dpo.types import LossOutput, PairLogps

LENGTHS = torch.tensor([2, 4]), torch.tensor([5, 1])


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    return PairLogps(torch.tensor(chosen).double(), torch.tensor(rejected).double(), *LENGTHS)


# Log-ratios: chosen 2 and -1, rejected -3 and 0.5; delta 5 and -1.5.
POLICY, REFERENCE = logps([-4.0, -9.0], [-8.0, -2.5]), logps([-6.0, -8.0], [-5.0, -3.0])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("name", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, [softplus(-0.5), softplus(0.15)]),
        ("sigmoid", 0.2, [0.8 * softplus(-0.5) + 0.2 * softplus(0.5), 0.8 * softplus(0.15) + 0.2 * softplus(-0.15)]),
        ("hinge", 0.0, [0.5, 1.15]),
        ("ipo", 0.0, [(2 / 2 + 3 / 5 - 5) ** 2, (-1 / 4 - 0.5 - 5) ** 2]),
        ("ipo_sum", 0.0, [0.0, (-1.5 - 5) ** 2]),
    ],
)
def test_losses_equal_values_worked_by_hand(name, smoothing, expected):
    output = make_loss(name, 0.1, smoothing)(POLICY, REFERENCE)
    assert output.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert output.chosen_rewards.tolist() == pytest.approx([0.2, -0.1])
    assert output.rejected_rewards.tolist() == pytest.approx([-0.3, 0.05])


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "ipo_sum"])
def test_gradients_equal_finite_differences(name):
    loss = make_loss(name, 0.3, 0.1 if name == "sigmoid" else 0.0)

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss(PairLogps(chosen, rejected, *LENGTHS), REFERENCE).losses

    inputs = tuple(x.clone().requires_grad_() for x in (POLICY.chosen, POLICY.rejected))
    assert torch.autograd.gradcheck(losses, inputs)


def test_rewards_carry_no_gradient():
    policy = PairLogps(POLICY.chosen.clone().requires_grad_(), POLICY.rejected, *LENGTHS)
    output = make_loss("sigmoid", 0.1)(policy, REFERENCE)
    assert output.losses.requires_grad and not output.chosen_rewards.requires_grad


@pytest.mark.parametrize(
    ("name", "expected"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 6.25), ("ipo_sum", 6.25)]
)
def test_equal_models_give_the_stated_start(name, expected):
    assert start_loss(name, 0.2) == pytest.approx(expected, rel=1e-6)
    assert make_loss(name, 0.2)(POLICY, POLICY).losses.tolist() == pytest.approx([expected] * 2)


def test_different_numbers_of_pairs_are_refused():
    with pytest.raises(ValueError, match="2 pairs, reference 1"):
        one = PairLogps(*(torch.ones(1) for _ in range(4)))
        make_loss("sigmoid", 0.1)(POLICY, one)


def test_metrics_are_sums_that_merge_and_a_tie_counts_one_half():
    def output(chosen: list[float], rejected: list[float]) -> LossOutput:
        return LossOutput(torch.ones(len(chosen)), torch.tensor(chosen), torch.tensor(rejected))

    whole = sums(output([1.0, 0.0], [0.0, 0.0]), POLICY) + sums(output([], []), logps([], []))
    found = averages(whole)
    assert tuple(found) == NAMES
    assert found["rewards/accuracies"] == 0.75
    assert found["rewards/margins"] == 0.5
    assert found["logps/chosen"] == -6.5
