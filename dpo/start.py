"""Is the start honest? Before the first step policy and reference are the same model and must say so.

With equal dtypes the loss of the first batch equals that of a pair without any difference (ln 2 for sigmoid). With
mixed dtypes, as on a GPU (bf16 policy, fp16 reference), the two differ by rounding: the mismatch is shown, and a run
that starts far off is stopped, since its rewards would be measured from the wrong place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dpo.errors import UserError
from dpo.model.forward import pair_logps
from dpo.objective.losses import Loss, start_loss
from dpo.policy import FrozenReference, Policy
from dpo.runtime import distributed
from dpo.runtime.tracking import Tracker
from dpo.setup import Setup
from dpo.types import PackedBatch

SAME_DTYPE_LOSS = 1e-5
MIXED_DTYPE_LOSS = 0.05
MIXED_DTYPE_TOKEN = 0.05
"""Largest distance from the loss of equal models, and between log-probs, nats per token."""


@torch.no_grad()
def check_start(
    setup: Setup,
    policy: Policy,
    reference: FrozenReference,
    loss: Loss,
    batches: Sequence[PackedBatch],
    tracker: Tracker,
) -> None:
    """Score the first step's pairs with both models and compare; collective.

    Raises:
        UserError: If the run would not start from the reference.
    """
    device = setup.world.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        on_device = batch.to(device)
        of_reference, of_policy = reference.train(on_device), pair_logps(policy.score, on_device)
        gap = (of_policy.chosen - of_reference.chosen).abs() + (of_policy.rejected - of_reference.rejected).abs()
        losses = loss(of_policy, of_reference).losses
        totals += torch.stack(
            [losses.double().sum(), gap.double().sum(), on_device.completion_lengths.sum().double(),
             torch.tensor(len(batch.pair_ids), dtype=torch.float64, device=device)]
        )
    loss_sum, gap_sum, tokens, pairs = distributed.sum_over_ranks(totals).tolist()
    mean, per_token = loss_sum / pairs, gap_sum / tokens
    expected = start_loss(setup.config.loss.name, setup.config.loss.beta)
    mixed = reference.dtype != setup.dtype
    limit = MIXED_DTYPE_LOSS if mixed else SAME_DTYPE_LOSS
    tracker.say(
        f"start: loss {mean:.6f} (equal models: {expected:.6f}), policy and reference differ by {per_token:.2g} nats"
        f" a token"
    )
    off = not math.isfinite(mean) or abs(mean - expected) > limit * max(1.0, expected)
    if off or (mixed and per_token > MIXED_DTYPE_TOKEN):
        raise UserError(
            f"the start is not honest: loss {mean:.6f} where equal models give {expected:.6f}, {per_token:.3g} nats a"
            f" token between policy ({setup.precision}) and reference; use --reference.dtype policy, or bf16 or fp32"
            f" where fp16 overflows"
        )
