"""The one table of losses: their names, what each needs, which options it takes, and which combinations are refused.

Plain data, so that the settings can be validated before anything heavy is imported. The functions themselves, with
equation and paper, stand under the same names in `losses`, `reference_free` and `coupled`; docs/objectives.md is made
of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

LossName = Literal[
    "sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "dpop", "odpo", "sampo", "tdpo", "aot", "aot_unpaired", "beta_dpo", "sft",
    "simpo", "orpo", "cpo",
]  # fmt: skip

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a loss needs of the run.

    Attributes:
        peers: Who else has it.
        options: Keys of the loss section that it takes, beside name, weights and beta.
        needs_reference: Whether its value depends on the reference.
        couples: Whether a pair's loss depends on the log-ratios of the other pairs of the global batch.
        averaged: Whether it is a function of log-probs per token: what its rewards then are, without a reference.
        whole_logps: Whether it needs the log-probs of whole completions, so that tokens cannot be weighted.
    """

    peers: str
    options: tuple[str, ...] = ()
    needs_reference: bool = True
    couples: bool = False
    averaged: bool = False
    whole_logps: bool = False


MODIFIERS = ("f_divergence", "length_normalize", "reference_free", "wpo", "ld_alpha")
"""Options that change what goes into every loss of a sum; the others belong to the loss that has them."""

_DELTA = MODIFIERS
_NORM = ("f_divergence", "reference_free", "wpo", "ld_alpha")
_EACH = ("length_normalize", "wpo", "ld_alpha")

LOSSES: dict[LossName, Facts] = {
    "sigmoid": Facts("all; with smoothing all but TRL", ("label_smoothing", *_DELTA)),
    "robust": Facts("TRL", ("label_smoothing", *_DELTA)),
    "hinge": Facts("TRL, torchtune, LLaMA-Factory, HALOs", _DELTA),
    "ipo": Facts("TRL, HALOs, LLaMA-Factory", _NORM),
    "ipo_sum": Facts("DPO authors, OpenRLHF, NeMo-Aligner", _DELTA),
    "sigmoid_norm": Facts("TRL, open-instruct, NeMo-RL", ("label_smoothing", *_NORM)),
    "exo_pair": Facts("TRL", ("label_smoothing", *_DELTA)),
    "nca_pair": Facts("TRL", _EACH),
    "bco_pair": Facts("TRL", _EACH),
    "sppo_hard": Facts("TRL", _EACH),
    "apo_zero": Facts("TRL", _EACH),
    "apo_down": Facts("TRL", _EACH),
    "discopop": Facts("TRL", ("discopop_tau", *_DELTA)),
    "dpop": Facts("none", ("dpop_lambda", "wpo", "ld_alpha")),
    "odpo": Facts("none", ("odpo_alpha", "odpo_scale", *_DELTA)),
    "sampo": Facts("none", whole_logps=True),
    "tdpo": Facts("none", ("tdpo_alpha",), whole_logps=True),
    "aot": Facts("TRL, within a micro-batch", ("label_smoothing", "ld_alpha"), couples=True),
    "aot_unpaired": Facts("TRL, within a micro-batch", ("label_smoothing", "ld_alpha"), couples=True),
    "beta_dpo": Facts("none", ("beta_dpo_alpha", "beta_dpo_momentum", "ld_alpha"), couples=True),
    "sft": Facts("TRL, OpenRLHF, NeMo-RL, LLaMA-Factory, ms-swift", needs_reference=False, whole_logps=True),
    "simpo": Facts(
        "open-instruct, LLaMA-Factory, HALOs, TRL's CPOTrainer", ("simpo_gamma", "wpo"), needs_reference=False,
        averaged=True,
    ),
    "orpo": Facts("LLaMA-Factory, TRL's ORPOTrainer", needs_reference=False, averaged=True, whole_logps=True),
    "cpo": Facts(
        "TRL's CPOTrainer, LLaMA-Factory", ("label_smoothing", "cpo_alpha"), needs_reference=False, whole_logps=True
    ),
}  # fmt: skip


def needs_reference(names: Sequence[LossName], reference_free: bool) -> bool:
    """Whether a sum of losses depends on a reference."""
    return not reference_free and any(LOSSES[name].needs_reference for name in names)


def couples_pairs(names: Sequence[LossName]) -> bool:
    """Whether the global batch must be scored before the first backward pass."""
    return any(LOSSES[name].couples for name in names)


def complaint(names: Sequence[LossName], given: dict[str, Any]) -> str | None:
    """What is wrong with a combination of losses and options.

    Args:
        names: Losses of the sum.
        given: Options that differ from their defaults, with their values.
    Returns:
        One line naming key, value and fix; None if the combination makes sense.
    """
    if len(set(names)) < len(names):
        return f"loss.name names a loss twice ({', '.join(names)}); name it once and set loss.weights"
    for option, value in given.items():
        # sft in a sum is per token and knows no reference: these leave it as it is.
        spared = ("sft",) if option in ("f_divergence", "length_normalize", "reference_free") else ()
        others = [name for name in names if name not in spared]
        have = [name for name in others if option in LOSSES[name].options]
        if not have or (option in MODIFIERS and len(have) < len(others)):
            lacking = next((name for name in others if name not in have), "sft")
            owners = " or ".join(name for name, facts in LOSSES.items() if option in facts.options)
            return f"loss.{option} is {value} with loss.name {lacking}; it belongs to {owners}"
    if "sampo" in names and len(names) > 1:
        return f"loss.name is {', '.join(names)}: sampo leaves tokens out, for every loss of a sum; use it alone"
    if "tdpo" in names and couples_pairs(names):
        coupled = next(name for name in names if LOSSES[name].couples)
        return (
            f"loss.name is {', '.join(names)}: tdpo needs the reference's whole distributions, and {coupled} scores the"
            f" global batch before they are there; use one of them"
        )
    if given.get("reference_free") and "f_divergence" in given:
        return "loss.f_divergence is set with loss.reference_free; a divergence needs a reference, drop one of them"
    squared = [name for name in names if name in ("ipo", "ipo_sum")]
    if squared and given.get("f_divergence") in ("forward_kl", "alpha"):
        return (
            f"loss.f_divergence is {given['f_divergence']} with loss.name {squared[0]}, which squares it: its scores"
            f" are exponentials of log-ratios, and e^45 has no square in fp32; use js or reverse_kl"
        )
    return None


def beta_note(names: tuple[LossName, ...], beta: float) -> str | None:
    """What to say of a beta far below those that are published for losses over means of tokens; None: nothing."""
    usual = {"simpo": "2 to 10", "sigmoid_norm": "about 5"}
    low = [name for name in names if name in usual and beta < 1]
    if not low:
        return None
    return f"loss.beta is {beta:g} with loss.name {low[0]}, which takes means over tokens: {usual[low[0]]} is usual"
