"""Score every validation pair exactly once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpo.model.forward import pair_logps
from dpo.objective.losses import Loss
from dpo.objective.metrics import averages, sums
from dpo.runtime import distributed
from dpo.types import PackedBatch, PairLogps


@torch.no_grad()
def evaluate(
    score: Callable[[PackedBatch], Tensor],
    reference: Callable[[int, PackedBatch], PairLogps],
    batches: Sequence[PackedBatch],
    loss: Loss,
    device: torch.device,
) -> dict[str, float]:
    """Metrics of the validation pairs; collective.

    Args:
        score: Scorer or engine of the policy.
        reference: reference(index, batch), which may remember its answers.
        batches: This rank's share, as many micro-batches as on every rank.
        loss: The objective.
        device: Of the model.
    Returns:
        Means over all pairs under TRL's names with the prefix `eval_`.
    """
    totals = torch.zeros(8, dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):
        on_device = batch.to(device)
        reference_logps = reference(index, on_device)
        policy_logps = pair_logps(score, on_device)
        totals += sums(loss(policy_logps, reference_logps), policy_logps)
    return {f"eval_{name}": value for name, value in averages(distributed.sum_over_ranks(totals)).items()}
