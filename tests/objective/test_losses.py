"""Losses against values worked by hand, against finite differences, and against one another where they must agree."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.objective.catalog import LOSSES
from dpo.objective.divergences import score
from dpo.objective.metrics import NAMES, averages, sums
from dpo.objective.objective import Objective
from dpo.objective.reference_free import log_odds, orpo
from dpo.types import Context, LossOutput, PairLogps

LENGTHS = torch.tensor([2, 4]), torch.tensor([5, 1])
MEAN_LENGTH = 3.0
# What a loss cannot do without.
NEEDED = {"exo_pair": {"label_smoothing": 0.25}}


def logps(chosen: list[float], rejected: list[float], **more: Any) -> PairLogps:
    return PairLogps(torch.tensor(chosen).double(), torch.tensor(rejected).double(), *LENGTHS, **more)


# Log-ratios: chosen 2 and -1, rejected -3 and 0.5; delta 5 and -1.5; gaps 4 and -6.5 under the policy, -1 and -5 under
# the reference.
KLS = torch.tensor([[0.5, 2.0], [3.0, 1.0]], dtype=torch.float64)
CERTAINTIES = torch.tensor([[-0.5, 0.25], [-1.0, 0.75]], dtype=torch.float64)
MARGINS = torch.tensor([[4.0], [0.5]], dtype=torch.float64)
POLICY = logps([-4.0, -9.0], [-8.0, -2.5], kls=KLS, certainties=CERTAINTIES)
REFERENCE = logps([-6.0, -8.0], [-5.0, -3.0])


def compute(
    policy: PairLogps = POLICY, reference: PairLogps = REFERENCE, running: float = 0.0, **loss: Any
) -> LossOutput:
    """The objective of a global batch."""
    objective = Objective(LossConfig(**loss), running)
    if not objective.needs_reference:
        reference = logps([0.0, 0.0], [0.0, 0.0])
    with torch.no_grad():
        partners = objective.couple(policy, reference, is_step=True)
    if "odpo" in objective.config.names:
        partners["odpo"] = MARGINS
    return objective(policy, reference, Context(MEAN_LENGTH, partners))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


BY_HAND: dict[str, tuple[dict[str, Any], list[float]]] = {
    "sigmoid": ({}, [softplus(-0.5), softplus(0.15)]),
    "cdpo": ({"name": "sigmoid", "label_smoothing": 0.2},
             [0.8 * softplus(-0.5) + 0.2 * softplus(0.5), 0.8 * softplus(0.15) + 0.2 * softplus(-0.15)]),
    "robust": ({"label_smoothing": 0.25}, [(0.75 * softplus(-0.5) - 0.25 * softplus(0.5)) / 0.5,
                                           (0.75 * softplus(0.15) - 0.25 * softplus(-0.15)) / 0.5]),
    "hinge": ({}, [0.5, 1.15]),
    "ipo": ({}, [(2 / 2 + 3 / 5 - 5) ** 2, (-1 / 4 - 0.5 - 5) ** 2]),
    "ipo_sum": ({}, [0.0, (-1.5 - 5) ** 2]),
    "sigmoid_norm": ({}, [softplus(-0.1 * 1.6), softplus(0.1 * 0.75)]),
    "exo_pair": ({"label_smoothing": 0.25}, [
        q * math.log(q / 0.75) + (1 - q) * math.log((1 - q) / 0.25) for q in (sigma(0.5), sigma(-0.15))]),
    "nca_pair": ({}, [softplus(-0.2) + 0.5 * softplus(0.2) + 0.5 * softplus(-0.3),
                      softplus(0.1) + 0.5 * softplus(-0.1) + 0.5 * softplus(0.05)]),
    "bco_pair": ({}, [softplus(-0.2) + softplus(-0.3), softplus(0.1) + softplus(0.05)]),
    "sppo_hard": ({}, [9 + 4, 36 + 5.5**2]),
    "apo_zero": ({}, [1 - sigma(0.2) + sigma(-0.3), 1 - sigma(-0.1) + sigma(0.05)]),
    "apo_down": ({}, [sigma(0.2) + 1 - sigma(0.5), sigma(-0.1) + 1 - sigma(-0.15)]),
    "discopop": ({"discopop_tau": 0.5}, [
        (1 - sigma(m / 0.5)) * softplus(-m) + sigma(m / 0.5) * math.exp(-m) for m in (0.5, -0.15)]),
    "odpo": ({"odpo_alpha": 0.5}, [softplus(0.5 * math.log(4) - 0.5), softplus(0.15 - 0.5 * math.log(2))]),
    "odpo, margins as they are": ({"name": "odpo", "odpo_alpha": 0.5, "odpo_scale": "identity"},
                                  [softplus(2 - 0.5), softplus(0.15 + 0.25)]),
    "dpop": ({"dpop_lambda": 10.0}, [softplus(-0.5), softplus(0.1 * (1.5 + 10))]),
    "sampo": ({}, [softplus(-0.5), softplus(0.15)]),
    "tdpo": ({"tdpo_alpha": 0.5}, [softplus(-0.1 * (5 - 0.5 * 2.5)), softplus(0.1 * (1.5 - 0.5 * 1))]),
    # The policy's gaps 4 > -6.5 meet the reference's -1 > -5.
    "aot": ({}, [softplus(-0.1 * 5), softplus(0.1 * 1.5)]),
    # Chosen 2 > -1 meet rejected 0.5 > -3: 2 with 0.5, -1 with -3.
    "aot_unpaired": ({}, [softplus(-0.1 * 1.5), softplus(-0.1 * 2)]),
    # The mean gap is 1.75, the running mean then 0.175, beta 0.1 (1 + 0.6 * 1.575).
    "beta_dpo": ({}, [softplus(-0.1945 * 5), softplus(0.1945 * 1.5)]),
    "sft": ({}, [4 / 3, 9 / 3]),
    "simpo": ({"simpo_gamma": 0.3}, [softplus(-(0.1 * (-2 + 1.6) - 0.3)), softplus(-(0.1 * (-2.25 + 2.5) - 0.3))]),
    "orpo": ({}, [4 / 3 + 0.1 * softplus(-math.log(odds(math.exp(-2.0)) / odds(math.exp(-1.6)))),
                  9 / 3 + 0.1 * softplus(-math.log(odds(math.exp(-2.25)) / odds(math.exp(-2.5))))]),
    "cpo": ({"cpo_alpha": 0.5}, [softplus(-0.1 * 4) + 0.5 * 4 / 3, softplus(0.1 * 6.5) + 0.5 * 9 / 3]),
    "rpo": ({"name": ("sigmoid", "sft"), "weights": (2.0, 0.5)},
            [2 * softplus(-0.5) + 0.5 * 4 / 3, 2 * softplus(0.15) + 0.5 * 9 / 3]),
    "mpo": ({"name": ("sigmoid", "bco_pair", "sft")},
            [softplus(-0.5) + softplus(-0.2) + softplus(-0.3) + 4 / 3,
             softplus(0.15) + softplus(0.1) + softplus(0.05) + 3]),
    "wpo": ({"name": "sigmoid", "wpo": True}, [math.exp(-1.5) * softplus(-0.5), math.exp(1.0) * softplus(0.15)]),
    "reference_free": ({"name": "sigmoid", "reference_free": True}, [softplus(-0.4), softplus(0.65)]),
    "length_normalize": ({"name": "hinge", "length_normalize": True}, [1 - 0.16, 1 + 0.075]),
    "forward_kl": ({"name": "hinge", "f_divergence": "forward_kl"},
                   [0.0, 1 - 0.1 * (math.exp(-0.5) - math.exp(1))]),
    "js": ({"name": "hinge", "f_divergence": "js"},
           [1 - 0.1 * (softplus(3) - softplus(-2)), 1 - 0.1 * (softplus(-0.5) - softplus(1))]),
    "alpha": ({"name": "hinge", "f_divergence": "alpha", "f_alpha": 0.5},
              [1 - 0.1 * 2 * (math.exp(1.5) - math.exp(-1)), 1 - 0.1 * 2 * (math.exp(-0.25) - math.exp(0.5))]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_equal_values_worked_by_hand(name):
    options, expected = BY_HAND[name]
    assert compute(**{"name": name, "beta": 0.1} | options).losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_every_loss_has_a_value_worked_by_hand():
    assert set(LOSSES) <= set(BY_HAND)


def pairs_of(chosen: Tensor, rejected: Tensor, kls: Tensor) -> PairLogps:
    return replace(POLICY, chosen=chosen, rejected=rejected, kls=kls)


@pytest.mark.parametrize("name", [n for n in LOSSES if not LOSSES[n].couples and n != "tdpo"])
def test_gradients_equal_finite_differences(name):
    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return compute(pairs_of(chosen, rejected, KLS), name=name, beta=0.3, **NEEDED.get(name, {})).losses

    inputs = tuple(x.clone().requires_grad_() for x in (POLICY.chosen, POLICY.rejected))
    assert torch.autograd.gradcheck(losses, inputs)


def test_the_gradient_of_tdpo_leaves_out_the_chosen_kl():
    def losses(chosen: Tensor, rejected: Tensor, rejected_kls: Tensor) -> Tensor:
        return compute(pairs_of(chosen, rejected, torch.stack((KLS[0], rejected_kls))), name="tdpo", beta=0.3).losses

    inputs = tuple(x.clone().requires_grad_() for x in (POLICY.chosen, POLICY.rejected, KLS[1]))
    assert torch.autograd.gradcheck(losses, inputs)
    kls = KLS.clone().requires_grad_()
    compute(replace(POLICY, kls=kls), name="tdpo").losses.sum().backward()
    assert kls.grad is not None and kls.grad[0].eq(0).all() and kls.grad[1].gt(0).all()


def random_batch(seed: int, pairs: int = 7) -> tuple[PairLogps, PairLogps]:
    numbers = torch.Generator().manual_seed(seed)
    values = [-3 * torch.rand(pairs, generator=numbers, dtype=torch.float64) - 1 for _ in range(4)]
    lengths = [torch.randint(1, 9, (pairs,), generator=numbers) for _ in range(2)]
    return PairLogps(*values[:2], *lengths), PairLogps(*values[2:], *lengths)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "beta_dpo"])
def test_fixed_partners_give_the_gradient_of_the_whole_batch_written_with_sort(name):
    policy, reference = random_batch(0)
    leaves = [x.clone().requires_grad_() for x in (policy.chosen, policy.rejected)] * 2
    leaves[2:] = [x.detach().clone().requires_grad_() for x in leaves[2:]]
    output = compute(replace(policy, chosen=leaves[0], rejected=leaves[1]), reference, name=name, beta=0.3)
    c, r = leaves[2] - reference.chosen, leaves[3] - reference.rejected
    if name == "aot":
        margins = (leaves[2] - leaves[3]).sort().values - (reference.chosen - reference.rejected).sort().values
    elif name == "aot_unpaired":
        margins = c.sort().values - r.sort().values
    else:
        mean = (c - r).mean().detach()
        assert -1 < mean < 0  # the batch's beta is another, and above its floor
        margins = (1 + 0.6 * 0.9 * mean) * (c - r)
    whole = -torch.nn.functional.logsigmoid(0.3 * margins).sum()
    torch.testing.assert_close(output.losses.sum(), whole, rtol=1e-12, atol=0)
    output.losses.sum().backward()
    whole.backward()
    for ours, theirs in zip(leaves[:2], leaves[2:], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_partners_of_equal_values_keep_the_order_of_the_pairs():
    objective = Objective(LossConfig(name="aot"))
    same = PairLogps(torch.zeros(3), torch.zeros(3), *(torch.ones(3, dtype=torch.int64),) * 2)
    reference = replace(same, chosen=torch.tensor([3.0, 1.0, 2.0]))
    assert objective.couple(same, reference, is_step=True)["aot"][:, 0].tolist() == [1.0, 2.0, 3.0]


def test_an_evaluation_leaves_the_running_mean_alone_and_beta_stays_positive():
    objective = Objective(LossConfig(name="beta_dpo", beta_dpo_alpha=1.0), running=100.0)
    partners = objective.couple(POLICY, REFERENCE, is_step=False)["beta_dpo"]
    assert objective.running == 100.0 and partners.flatten().tolist() == [1e-3, 1e-3]
    objective.couple(POLICY, REFERENCE, is_step=True)
    assert objective.running == pytest.approx(0.9 * 100 + 0.1 * 1.75)


EQUAL_LENGTHS = replace(POLICY, chosen_lengths=torch.ones(2), rejected_lengths=torch.ones(2))
LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "robust without smoothing is DPO": ({"name": "robust"}, {"name": "sigmoid"}),
    "odpo without an offset is DPO": ({"name": "odpo", "odpo_alpha": 0.0}, {"name": "sigmoid"}),
    "dpop without a price is DPO": ({"name": "dpop", "dpop_lambda": 0.0}, {"name": "sigmoid"}),
    "tdpo without the KL is DPO": ({"name": "tdpo", "tdpo_alpha": 0.0}, {"name": "sigmoid"}),
    "beta_dpo that follows nothing is DPO": ({"name": "beta_dpo", "beta_dpo_alpha": 0.0}, {"name": "sigmoid"}),
    "cpo's preference is DPO without a reference": (
        {"name": "cpo", "cpo_alpha": 0.0}, {"name": "sigmoid", "reference_free": True}),
    "simpo without margin and length is cpo's preference": (
        {"name": "simpo", "simpo_gamma": 0.0}, {"name": "cpo", "cpo_alpha": 0.0}),
    "ipo per token of one token is ipo": ({"name": "ipo"}, {"name": "ipo_sum"}),
    "orpo without odds is sft": ({"name": "orpo", "beta": 1e-12}, {"name": "sft"}),
    "a length of one normalises nothing": ({"name": "apo_down", "length_normalize": True}, {"name": "apo_down"}),
    "the alpha divergence at 1 is the reverse KL": (
        {"name": "sigmoid", "f_divergence": "alpha", "f_alpha": 1.0}, {"name": "sigmoid"}),
    "an alpha near 1 is nearly so": (
        {"name": "sigmoid", "f_divergence": "alpha", "f_alpha": 1.0 + 1e-5}, {"name": "sigmoid"}),
}  # fmt: skip


@pytest.mark.parametrize("claim", LIMITS)
def test_limits_tie_losses_together(claim):
    one, other = (compute(EQUAL_LENGTHS, **options).losses for options in LIMITS[claim])
    torch.testing.assert_close(one, other, rtol=1e-4 if "near" in claim else 1e-10, atol=1e-11)


@pytest.mark.parametrize(("one", "other"), [("sigmoid_norm", "sigmoid"), ("ipo", "ipo_sum")])
def test_length_normalize_makes_the_averaged_loss_of_the_summed_one(one, other):
    normalised = compute(name=other, length_normalize=True)
    assert compute(name=one).losses.tolist() == pytest.approx(normalised.losses.tolist())


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_a_divergence_is_0_and_of_slope_1_or_a_half_where_models_agree(divergence):
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = score(z, divergence)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-15)
    assert z.grad.item() == pytest.approx(0.5 if divergence == "js" else 1.0)
    far = torch.tensor([-1e4], requires_grad=True)
    value = score(far, divergence)
    value.backward()
    assert value.isfinite().all() and far.grad.item() > 0


@pytest.mark.parametrize("sides", [(-200.0, 0.0), (-200.0, -300.0)])
@pytest.mark.parametrize("settings", [{"name": "discopop"}, {"f_divergence": "forward_kl"}, {"f_divergence": "alpha"}])
def test_exponentials_stay_finite_where_they_would_not_be(sides, settings):
    chosen, rejected = (torch.tensor([side], requires_grad=True) for side in sides)
    zero = torch.zeros(1)
    policy, reference = PairLogps(chosen, rejected, zero + 5, zero + 5), PairLogps(zero, zero, zero + 5, zero + 5)
    loss = Objective(LossConfig(beta=1.0, **settings))(policy, reference, Context(MEAN_LENGTH, {})).losses.sum()
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite() and rejected.grad.isfinite()


@pytest.mark.parametrize("logps", [(0.0, -1.0), (-1e-9, -1.0), (0.0, 0.0), (-1.0, 0.0)])
def test_a_completion_that_is_certain_leaves_orpo_finite(logps):
    """In fp32 a token's log-prob is 0 once its probability is above 1 - 6e-8."""
    chosen, rejected = (torch.tensor([logp], requires_grad=True) for logp in logps)
    one = torch.ones(1)
    value = orpo(chosen, rejected, one, one, 1.0, 0.1)
    value.sum().backward()
    assert value.isfinite() and chosen.grad.isfinite() and chosen.grad.item() < 0
    assert rejected.grad.isfinite() and rejected.grad.item() > 0
    if logps == (0.0, -1.0):  # the limit: -1 / mean length - beta odds(p_r)
        assert chosen.grad.item() == pytest.approx(-1 - 0.1 / (math.e - 1), rel=1e-4)


def test_log_odds_are_accurate_for_certain_and_for_hopeless_completions():
    for logp in (-1e-9, -0.3, -0.6931, -0.7, -5.0, -90.0):
        value = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
        expected = logp - math.log(-math.expm1(logp))
        odds_of = log_odds(value)
        odds_of.backward()
        assert odds_of.item() == pytest.approx(expected, rel=1e-9)
        assert value.grad.item() == pytest.approx(1 / -math.expm1(logp), rel=1e-6)


STARTS = {
    "sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 6.25, "ipo_sum": 6.25,
    "sigmoid_norm": math.log(2), "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2), "sppo_hard": 12.5,
    "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * math.log(2) + 0.5, "dpop": math.log(2), "sampo": math.log(2),
    "tdpo": math.log(2), "aot": math.log(2), "beta_dpo": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_equal_models_give_the_stated_start(name):
    equal = replace(POLICY, kls=torch.zeros(2, 2))
    losses = compute(equal, POLICY, name=name, beta=0.2).losses
    assert losses.tolist() == pytest.approx([STARTS[name]] * 2, rel=1e-6)


def test_rewards_are_beta_times_what_the_loss_compares_and_carry_no_gradient():
    policy = replace(POLICY, chosen=POLICY.chosen.clone().requires_grad_())
    for name in ("sigmoid", "ipo", "tdpo"):
        output = compute(policy, name=name)
        assert output.losses.requires_grad and not output.chosen_rewards.requires_grad
        assert output.chosen_rewards.tolist() == pytest.approx([0.2, -0.1])
        assert output.rejected_rewards.tolist() == pytest.approx([-0.3, 0.05])
    assert compute(name="cpo").chosen_rewards.tolist() == pytest.approx([-0.4, -0.9])
    assert compute(name="simpo").chosen_rewards.tolist() == pytest.approx([-0.2, -0.225])
    assert compute(name="simpo").rejected_rewards.tolist() == pytest.approx([-0.16, -0.25])


def test_different_numbers_of_pairs_are_refused():
    with pytest.raises(ValueError, match="2 pairs, reference 1"):
        Objective(LossConfig())(POLICY, PairLogps(*(torch.ones(1) for _ in range(4))), Context(1.0))


@pytest.mark.parametrize("more", [{}, {"wpo": True}])
def test_the_parts_of_a_sum_are_its_losses_before_their_weights(more):
    names = ("sigmoid", "hinge") if more else ("sigmoid", "bco_pair", "sft")
    weights = (2.0, 0.5, 0.25)[: len(names)]
    mixed, alone = compute(name=names, weights=weights, **more), [compute(name=name, **more) for name in names]
    assert torch.equal(mixed.parts, torch.stack([one.losses for one in alone]))
    torch.testing.assert_close(torch.tensor(weights).double() @ mixed.parts, mixed.losses)
    assert all(one.parts is None for one in alone)
    found = averages(sums(mixed, POLICY), names)
    assert tuple(found) == (*NAMES, *(f"loss/{name}" for name in names))
    assert [found[f"loss/{name}"] for name in names] == [pytest.approx(one.losses.mean().item()) for one in alone]


def test_metrics_are_sums_that_merge_and_a_tie_counts_one_half():
    def output(chosen: list[float], rejected: list[float]) -> LossOutput:
        return LossOutput(torch.ones(len(chosen)), torch.tensor(chosen), torch.tensor(rejected))

    whole = sums(output([1.0, 0.0], [0.0, 0.0]), POLICY) + sums(output([], []), logps([], []))
    found = averages(whole)
    assert tuple(found) == NAMES
    assert found["rewards/accuracies"] == 0.75
    assert found["rewards/margins"] == 0.5
    assert found["logps/chosen"] == -6.5
