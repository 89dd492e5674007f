"""The objective of a run: one loss or a weighted sum, with its modifiers, as one function of log-probs.

    policy, reference, context  ->  LossOutput per pair

A loss that couples pairs takes its partners from the context; `Objective.couple` makes them from the log-probs of the
whole global batch. Without a reference the reference says 0, so that log-ratios are log-probs.

Legend: P pairs of a micro-batch, B pairs of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.objective import coupled, divergences, losses, reference_free
from dpo.objective.catalog import LOSSES, LossName, couples_pairs, needs_reference
from dpo.types import Context, LossOutput, PairLogps


class Inputs(NamedTuple):
    """What the losses are functions of.

    Attributes:
        chosen, rejected: (P,) scores: log-ratios after f-divergence and length normalisation.
        policy, reference: Log-probs.
        context: Of the global batch.
    """

    chosen: Tensor
    rejected: Tensor
    policy: PairLogps
    reference: PairLogps
    context: Context


def _lengths(x: Inputs) -> tuple[Tensor, Tensor]:
    return x.policy.chosen_lengths, x.policy.rejected_lengths


def _tdpo(x: Inputs, o: LossConfig) -> Tensor:
    assert x.policy.kls is not None
    chosen_kls, rejected_kls = x.policy.kls
    return losses.tdpo(x.chosen, x.rejected, chosen_kls, rejected_kls, o.beta, o.tdpo_alpha)


TERMS: dict[LossName, Callable[[Inputs, LossConfig], Tensor]] = {
    "sigmoid": lambda x, o: losses.sigmoid(x.chosen, x.rejected, o.beta, o.label_smoothing),
    "robust": lambda x, o: losses.robust(x.chosen, x.rejected, o.beta, o.label_smoothing),
    "hinge": lambda x, o: losses.hinge(x.chosen, x.rejected, o.beta),
    "ipo": lambda x, o: losses.ipo(x.chosen, x.rejected, *_lengths(x), o.beta),
    "ipo_sum": lambda x, o: losses.ipo_sum(x.chosen, x.rejected, o.beta),
    "sigmoid_norm": lambda x, o: losses.sigmoid_norm(x.chosen, x.rejected, *_lengths(x), o.beta, o.label_smoothing),
    "exo_pair": lambda x, o: losses.exo_pair(x.chosen, x.rejected, o.beta, o.label_smoothing),
    "nca_pair": lambda x, o: losses.nca_pair(x.chosen, x.rejected, o.beta),
    "bco_pair": lambda x, o: losses.bco_pair(x.chosen, x.rejected, o.beta),
    "sppo_hard": lambda x, o: losses.sppo_hard(x.chosen, x.rejected, o.beta),
    "apo_zero": lambda x, o: losses.apo_zero(x.chosen, x.rejected, o.beta),
    "apo_down": lambda x, o: losses.apo_down(x.chosen, x.rejected, o.beta),
    "discopop": lambda x, o: losses.discopop(x.chosen, x.rejected, o.beta, o.discopop_tau),
    "dpop": lambda x, o: losses.dpop(x.chosen, x.rejected, o.beta, o.dpop_lambda),
    "odpo": lambda x, o: losses.odpo(
        x.chosen, x.rejected, x.context.partners["odpo"][:, 0], o.beta, o.odpo_alpha, o.odpo_scale
    ),
    "sampo": lambda x, o: losses.sampo(x.chosen, x.rejected, o.beta),
    "tdpo": _tdpo,
    "aot": lambda x, o: coupled.aot(
        x.policy.chosen - x.policy.rejected, x.context.partners["aot"], o.beta, o.label_smoothing
    ),
    "aot_unpaired": lambda x, o: coupled.aot_unpaired(
        x.chosen, x.rejected, x.context.partners["aot_unpaired"], o.beta, o.label_smoothing
    ),
    "beta_dpo": lambda x, o: coupled.beta_dpo(x.chosen, x.rejected, x.context.partners["beta_dpo"]),
    "sft": lambda x, o: reference_free.sft(x.policy.chosen, x.context.chosen_length),
    "simpo": lambda x, o: reference_free.simpo(
        x.policy.chosen, x.policy.rejected, *_lengths(x), o.beta, o.simpo_gamma
    ),
    "orpo": lambda x, o: reference_free.orpo(
        x.policy.chosen, x.policy.rejected, *_lengths(x), x.context.chosen_length, o.beta
    ),
    "cpo": lambda x, o: reference_free.cpo(
        x.policy.chosen, x.policy.rejected, x.context.chosen_length, o.beta, o.label_smoothing, o.cpo_alpha
    ),
}  # fmt: skip


@dataclass(slots=True)
class Objective:
    """A weighted sum of losses.

    Attributes:
        config: The loss section.
        running: What is carried from step to step: beta_dpo's running mean of log-ratio gaps, nats; else 0.
    """

    config: LossConfig
    running: float = 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether a reference must score the pairs."""
        return needs_reference(self.config.names, self.config.reference_free)

    @property
    def couples(self) -> bool:
        """Whether the global batch must be scored before the first backward pass."""
        return couples_pairs(self.config.names)

    @property
    def names_of_parts(self) -> tuple[str, ...]:
        """The losses of a sum; none where there is a single one."""
        return self.config.names if len(self.config.names) > 1 else ()

    def __call__(self, policy: PairLogps, reference: PairLogps, context: Context) -> LossOutput:
        """The losses of some pairs.

        Args:
            policy: Of the policy, with gradient. Fields (P,).
            reference: Of the frozen reference, or zeros. Fields (P,).
            context: Of their global batch, with partners for these pairs.
        Returns:
            Losses (P,), not reduced, and detached rewards (P,).
        Raises:
            ValueError: If policy and reference differ in P.
        """
        if policy.chosen.shape != reference.chosen.shape:
            raise ValueError(f"policy has {len(policy.chosen)} pairs, reference {len(reference.chosen)}")
        o = self.config
        ratios = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        scores = [divergences.score(z, o.f_divergence, o.f_alpha) for z in ratios]
        if o.length_normalize:
            scores = [scores[0] / policy.chosen_lengths, scores[1] / policy.rejected_lengths]
        inputs = Inputs(scores[0], scores[1], policy, reference, context)
        terms = [TERMS[name](inputs, o) for name in o.names]
        if o.wpo:
            assert policy.certainties is not None
            certainty = policy.certainties.sum(dim=0).exp()
            terms = [term * certainty for term in terms]
        total = sum(weight * term for weight, term in zip(o.weights_of_names, terms, strict=True))
        assert isinstance(total, Tensor)
        parts = torch.stack(terms).detach() if len(terms) > 1 else None
        if not self.needs_reference and LOSSES[o.names[0]].averaged:
            ratios = ratios[0] / policy.chosen_lengths, ratios[1] / policy.rejected_lengths
        return LossOutput(total, o.beta * ratios[0].detach(), o.beta * ratios[1].detach(), parts)

    def couple(self, policy: PairLogps, reference: PairLogps, *, is_step: bool) -> dict[str, Tensor]:
        """What the pairs of a global batch give to one another.

        Args:
            policy, reference: Of the whole global batch, in an order that does not depend on ranks. Fields (B,).
            is_step: Whether a step is made of them, which `running` then takes in; an evaluation leaves no trace.
        Returns:
            Loss -> (B, k), for `Context.partners`.
        """
        o, partners = self.config, {}
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        if "aot" in o.names:
            gaps = policy.chosen - policy.rejected, reference.chosen - reference.rejected
            partners["aot"] = coupled.aot_partners(*gaps)
        if "aot_unpaired" in o.names:
            partners["aot_unpaired"] = coupled.aot_unpaired_partners(chosen, rejected)
        if "beta_dpo" in o.names:
            if is_step:
                self.running = coupled.moving_mean(self.running, chosen - rejected, o.beta_dpo_momentum)
            partners["beta_dpo"] = coupled.beta_dpo_partners(
                chosen - rejected, self.running, o.beta, o.beta_dpo_alpha
            )
        return partners
