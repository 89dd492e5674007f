"""Score every validation pair exactly once, whatever the number of ranks.

What stands under `eval_` is the mean over the pairs of all validation sets together; what stands under `eval_NAME_`
over those of one. Each set is one global batch: a loss that couples pairs couples all pairs of a set, and what it says
of one set does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dpo.context import contexts_of, look_ahead
from dpo.model.reference import Reference
from dpo.objective.metrics import averages, sums
from dpo.objective.objective import Objective
from dpo.policy import Policy
from dpo.runtime import distributed
from dpo.runtime.distributed import World
from dpo.types import PackedBatch


@dataclass(frozen=True, slots=True)
class ValidationShare:
    """What one rank scores of a validation set.

    Attributes:
        batches: As many micro-batches as on every rank.
        chosen_length: Mean chosen completion tokens a pair, over all ranks.
    """

    batches: Sequence[PackedBatch]
    chosen_length: float


@torch.no_grad()
def evaluate(
    policy: Policy, reference: Reference, sets: Mapping[str, ValidationShare], loss: Objective, world: World
) -> dict[str, float]:
    """Metrics of the validation pairs; collective.

    Args:
        policy: What is evaluated.
        reference: Scores each batch, or remembers what it said.
        sets: Name of every validation set ("" for one without) -> this rank's share.
        loss: The objective.
        world: This rank.
    Returns:
        Means over all pairs under TRL's names with the prefix `eval_`, and over those of named sets, `eval_NAME_`.
    """
    totals = torch.zeros(len(sets), 8, dtype=torch.float64, device=world.device)
    for place, share in enumerate(sets.values()):
        scored = look_ahead(policy, reference, share.batches, world.device)
        contexts = contexts_of(loss, share.batches, scored, share.chosen_length, world, is_step=False)
        for (policy_logps, reference_logps), context in zip(scored, contexts, strict=True):
            totals[place] += sums(loss(policy_logps, reference_logps, context), policy_logps)
    totals = distributed.sum_over_ranks(totals)
    found = {f"eval_{key}": value for key, value in averages(totals.sum(dim=0)).items()}
    for name, own in zip(sets, totals, strict=True):
        if name:
            found |= {f"eval_{name}_{key}": value for key, value in averages(own).items()}
    return found
