"""The table of losses is complete, the page made of it is up to date, and what makes no sense is refused by name."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from docs.loss_table import PAGE, page
from dpo.config import Config, DataConfig, LossConfig, ModelConfig, ReferenceConfig
from dpo.objective.catalog import LOSSES, LossName, beta_note
from dpo.objective.objective import TERMS, Objective


def test_every_name_has_its_facts_and_its_function():
    assert list(get_args(LossName)) == list(LOSSES) == list(TERMS)


def test_the_page_of_losses_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python -m docs.loss_table"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an option of another loss": (
        {"name": "sigmoid", "simpo_gamma": 1.0}, "loss.simpo_gamma is 1.0 with loss.name sigmoid; it belongs to simpo"),
    "smoothing without a place": (
        {"name": ("hinge", "sft"), "label_smoothing": 0.1}, "loss.label_smoothing is 0.1 with loss.name hinge; it be"),
    "a divergence of absolute rewards": (
        {"name": "nca_pair", "f_divergence": "js"}, "loss.f_divergence is js with loss.name nca_pair; it belongs"),
    "one of a sum cannot": (
        {"name": ("sigmoid", "nca_pair"), "f_divergence": "js"}, "loss.f_divergence is js with loss.name nca_pair"),
    "a divergence for sft alone": (
        {"name": "sft", "f_divergence": "js"}, "loss.f_divergence is js with loss.name sft; it belongs to sigmoid"),
    "weights of pairs for a likelihood": (
        {"name": ("sigmoid", "sft"), "wpo": True}, "loss.wpo is True with loss.name sft; it belongs to sigmoid"),
    "weights of tokens for a likelihood": (
        {"name": ("sigmoid", "sft"), "ld_alpha": 0.5}, "loss.ld_alpha is 0.5 with loss.name sft; it belongs to"),
    "weights of pairs across pairs": ({"name": "aot", "wpo": True}, "loss.wpo is True with loss.name aot; it belongs"),
    "normalised twice": (
        {"name": "ipo", "length_normalize": True}, "loss.length_normalize is True with loss.name ipo; it belongs to"),
    "no reference to be positive about": (
        {"name": "dpop", "reference_free": True}, "loss.reference_free is True with loss.name dpop; it belongs to"),
    "a divergence from nothing": (
        {"reference_free": True, "f_divergence": "js"}, "loss.f_divergence is set with loss.reference_free; a diverg"),
    "an exponential that is squared": (
        {"name": ("sft", "ipo"), "f_divergence": "forward_kl"}, "loss.f_divergence is forward_kl with loss.name ipo,"),
    "sampled tokens for another loss": ({"name": ("sampo", "hinge")}, "loss.name is sampo, hinge: sampo leaves"),
    "distributions that are gone": ({"name": ("tdpo", "aot")}, "loss.name is tdpo, aot: tdpo needs the reference's"),
    "twice the same": ({"name": ("sigmoid", "sigmoid")}, "loss.name names a loss twice (sigmoid, sigmoid); name it"),
    "weights that do not match": (
        {"name": ("sigmoid", "sft"), "weights": (1.0,)}, "loss.weights is [1.0]; use a positive number for each of"),
    "a weight below 0": (
        {"name": ("sigmoid", "sft"), "weights": (1.0, -1.0)}, "loss.weights is [1.0, -1.0]; use a positive number"),
    "an alpha without its divergence": ({"f_alpha": 0.3}, "loss.f_alpha is 0.3 with loss.f_divergence reverse_kl; it"),
    "exo without smoothing": ({"name": "exo_pair"}, "loss.label_smoothing is 0 with loss.name exo_pair, which divides"),
    "no loss at all": ({"name": ()}, "loss.name is an empty list; name a loss, sigmoid is DPO"),
    "a weight above 1": ({"ld_alpha": 1.5}, "loss.ld_alpha is 1.5; use a number in [0, 1]"),
    "a momentum of 1": (
        {"name": "beta_dpo", "beta_dpo_momentum": 1.0}, "loss.beta_dpo_momentum is 1.0; use a number in [0, 1)"),
    "a price below 0": ({"name": "dpop", "dpop_lambda": -1.0}, "loss.dpop_lambda is -1.0; use a number of at least 0"),
    "no temperature": ({"name": "discopop", "discopop_tau": 0.0}, "loss.discopop_tau is 0.0; use a positive number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_that_make_no_sense_are_refused_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError) as refused:
        LossConfig(**options)
    assert str(refused.value).startswith(message)


ALLOWED: list[dict[str, Any]] = [
    {"name": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0)},
    {"name": ("sigmoid", "sft"), "f_divergence": "js", "length_normalize": True},
    {"name": ("sigmoid", "sft"), "reference_free": True},
    {"name": ("aot", "sft"), "label_smoothing": 0.1},
    {"name": "sigmoid", "ld_alpha": 0.5, "wpo": True, "label_smoothing": 0.1, "f_divergence": "alpha", "f_alpha": 0.3},
]


@pytest.mark.parametrize("options", ALLOWED, ids=lambda options: str(options["name"]))
def test_combinations_that_make_sense_are_taken(options):
    assert LossConfig(**options).names


REFERENCES = {
    ("none", "sigmoid"): "reference.mode is none with loss.name sigmoid, which needs a reference",
    ("cached", "tdpo"): "reference.mode is cached with loss.name tdpo, which needs whole next-token distributions",
    ("cached", "sampo"): "reference.mode is cached with loss.name sampo, which draws tokens anew",
}


@pytest.mark.parametrize(("mode", "name"), REFERENCES)
def test_a_reference_that_the_loss_cannot_use_is_refused(mode, name):
    with pytest.raises(ValueError, match=REFERENCES[mode, name]):
        Config(
            model=ModelConfig(policy="x"), data=DataConfig(train="y"), loss=LossConfig(name=name),
            reference=ReferenceConfig(mode=mode),
        )


@pytest.mark.parametrize(
    ("name", "mode"), [("simpo", "none"), ("cpo", "online"), ("sigmoid", "online"), ("simpo", "cached")]
)
def test_a_loss_without_a_reference_takes_either_mode(name, mode):
    config = Config(
        model=ModelConfig(policy="x"), data=DataConfig(train="y"), loss=LossConfig(name=name),
        reference=ReferenceConfig(mode=mode),
    )
    assert config.needs_reference is (name == "sigmoid") is Objective(config.loss).needs_reference


@pytest.mark.parametrize(
    ("names", "beta", "said"),
    [
        (("simpo",), 0.1, "loss.beta is 0.1 with loss.name simpo, which takes means over tokens: 2 to 10 is usual"),
        (("sft", "sigmoid_norm"), 0.5, "with loss.name sigmoid_norm, which takes means over tokens: about 5 is usual"),
        (("simpo",), 2.0, None), (("sigmoid",), 0.1, None),
    ],
)
def test_a_beta_far_below_what_is_usual_for_means_over_tokens_is_remarked_upon(names, beta, said):
    found = beta_note(names, beta)
    assert (found is None) is (said is None) and (said or "") in (found or "")
