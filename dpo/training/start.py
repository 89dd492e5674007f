"""Is the start honest? Before the first step policy and reference are the same model and must say so.

With equal dtypes the loss of the first step equals the one it would have if the policy said exactly what the reference
says (ln 2 for sigmoid). With mixed dtypes, as on a GPU (bf16 policy, fp16 reference), and where cached scores were made
of other batches there in 16 bits, the two differ by rounding: the mismatch is shown, and a run that starts far off is
stopped, since its rewards would be measured from the wrong place.
Without a reference there is nothing to compare: the loss must be finite. Where another model is the reference
(reference.path), the difference is shown and judged by nobody.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from dpo.data.loader import StepBatches
from dpo.errors import UserError
from dpo.model.check import counted_tokens
from dpo.model.products import HALF
from dpo.objective.objective import Objective
from dpo.run.setup import Setup
from dpo.runtime import distributed
from dpo.runtime.tracking import Tracker
from dpo.training.context import Scored, contexts_of, look_ahead
from dpo.training.frozen import FrozenReference
from dpo.training.policy import Policy
from dpo.types import PairLogps

SAME_DTYPE_LOSS = 1e-5
MIXED_DTYPE_LOSS = 0.05
MIXED_DTYPE_TOKEN = 0.05
"""Largest distance from the loss of equal models, and between log-probs, nats per token."""


def _loss_sum(setup: Setup, loss: Objective, work: StepBatches, scored: Scored) -> torch.Tensor:
    """Scalar: the loss summed over this rank's pairs; collective where pairs are coupled."""
    contexts = contexts_of(
        loss, work.batches, scored, work.chosen_length, setup.world, setup.ranks_a_row, is_step=False
    )
    losses = [loss(*pair, context).losses for pair, context in zip(scored, contexts, strict=True)]
    return torch.cat(losses).double().sum()


def _as_if_equal(policy: PairLogps, reference: PairLogps) -> tuple[PairLogps, PairLogps]:
    """What would be scored if the policy were the reference."""
    kls = None if policy.kls is None else torch.zeros_like(policy.kls)
    return replace(policy, chosen=reference.chosen, rejected=reference.rejected, kls=kls), reference


def rounds_apart(setup: Setup, reference: FrozenReference) -> bool:
    """Whether equal models round in different ways: in other dtypes, or in 16 bits where the blocks of the policy alone
    are compiled or, on a GPU, the scores are cached (of batches of another size)."""
    if reference.dtype != setup.dtype:
        return True
    of_other_batches = reference.scorer is None and setup.world.device.type == "cuda"
    return setup.dtype in HALF and (setup.config.model.compile or of_other_batches)


@torch.no_grad()
def check_start(
    setup: Setup, policy: Policy, reference: FrozenReference, loss: Objective, work: StepBatches, tracker: Tracker
) -> None:
    """Score the first step's pairs with both models and compare; collective.

    Raises:
        UserError: If the run would not start from the reference.
    """
    scored = look_ahead(policy, reference.of_training, work.batches, setup.world.device)
    equal = [_as_if_equal(*pair) for pair in scored] if loss.needs_reference else scored
    gaps = [(p.chosen - r.chosen).abs() + (p.rejected - r.rejected).abs() for p, r in scored]
    lengths = [torch.stack((p.chosen_lengths, p.rejected_lengths)) for p, _ in scored]
    counted = [counted_tokens(each, setup.dtype) for each in lengths]
    totals = torch.stack([
        _loss_sum(setup, loss, work, scored), _loss_sum(setup, loss, work, equal), torch.cat(gaps).double().sum(),
        torch.cat(lengths, dim=1).double().sum(), torch.cat(counted, dim=1).sum(),
    ])  # fmt: skip
    # Ranks that compute a row together all know its pairs.
    totals /= setup.ranks_a_row
    loss_sum, equal_sum, gap_sum, token_sum, counted_sum = distributed.sum_over_ranks(totals).tolist()
    mean, expected, per_token = loss_sum / work.num_pairs, equal_sum / work.num_pairs, gap_sum / token_sum
    if not loss.needs_reference:
        tracker.say(f"start: loss {mean:.6f}, no reference to compare with")
        if not math.isfinite(mean):
            raise UserError(f"the loss of the first step is {mean}; use bf16 or fp32 where fp16 overflows")
        return
    mixed = rounds_apart(setup, reference)
    limit = MIXED_DTYPE_LOSS if mixed else SAME_DTYPE_LOSS
    tracker.say(
        f"start: loss {mean:.6f} (equal models: {expected:.6f}), policy and reference differ by {per_token:.2g} nats"
        f" a token"
    )
    if setup.config.reference.path is not None and math.isfinite(mean):
        return  # another model: it differs, and the line above says by how much
    off = not math.isfinite(mean) or not abs(mean - expected) <= limit * max(1.0, expected)
    if off or (mixed and gap_sum / counted_sum > MIXED_DTYPE_TOKEN):
        raise UserError(
            f"the start is not honest: loss {mean:.6f} where equal models give {expected:.6f}, {per_token:.3g} nats a"
            f" token between policy ({setup.precision}) and reference; use --reference.dtype policy, or bf16 or fp32"
            f" where fp16 overflows"
        )
