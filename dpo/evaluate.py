"""Score every validation pair exactly once, whatever the number of ranks.

What stands under `eval_` is the mean over the pairs of all validation sets together; what stands under `eval_NAME_`
over those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    sets: Mapping[str, Sequence[PackedBatch]],
    loss: Loss,
    device: torch.device,
) -> dict[str, float]:
    """Metrics of the validation pairs; collective.

    Args:
        score: Scorer or engine of the policy.
        reference: reference(index, batch), which may remember its answers.
        sets: Name of every validation set ("" for one without) -> this rank's share, as many micro-batches as on every
            rank.
        loss: The objective.
        device: Of the model.
    Returns:
        Means over all pairs under TRL's names with the prefix `eval_`, and over those of named sets, `eval_NAME_`.
    """
    totals = torch.zeros(len(sets), 8, dtype=torch.float64, device=device)
    flat = [(place, batch) for place, batches in enumerate(sets.values()) for batch in batches]
    for index, (place, batch) in enumerate(flat):
        on_device = batch.to(device)
        reference_logps = reference(index, on_device)
        policy_logps = pair_logps(score, on_device)
        totals[place] += sums(loss(policy_logps, reference_logps), policy_logps)
    totals = distributed.sum_over_ranks(totals)
    found = {f"eval_{key}": value for key, value in averages(totals.sum(dim=0)).items()}
    for name, own in zip(sets, totals, strict=True):
        if name:
            found |= {f"eval_{name}_{key}": value for key, value in averages(own).items()}
    return found
