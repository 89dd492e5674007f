"""Score every validation pair exactly once, whatever the number of ranks.

What stands under `eval_` is the mean over the pairs of all validation sets together; what stands under `eval_NAME_`
over those of one. Each set is one global batch: a loss that couples pairs couples all pairs of a set, and what it says
of one set does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dpo.model.reference import Reference
from dpo.objective.metrics import averages, sums
from dpo.objective.objective import Objective
from dpo.report.pairs import COLUMNS
from dpo.runtime import distributed
from dpo.runtime.distributed import World
from dpo.training.context import contexts_of, look_ahead
from dpo.training.policy import Policy
from dpo.types import LossOutput, PackedBatch, PairLogps


@dataclass(frozen=True, slots=True)
class ValidationShare:
    """What one rank scores of a validation set.

    Attributes:
        batches: As many micro-batches as on every rank.
        chosen_length: Mean scored tokens of chosen completions, over all ranks.
        answers: What the reference said of them, in order, once it was asked: it does not change. Of dummy batches too:
            under ZeRO-3 ranks that have pairs wait for those that have none.
    """

    batches: Sequence[PackedBatch]
    chosen_length: float
    answers: list[PairLogps] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    policy: Policy, reference: Reference, sets: Mapping[str, ValidationShare], loss: Objective, world: World
) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of the validation pairs; collective.

    Args:
        policy: What is evaluated.
        reference: The frozen reference.
        sets: Name of every validation set ("" for one without) -> this rank's share.
        loss: The objective.
        world: This rank.
    Returns:
        Means over all pairs under TRL's names with the prefix `eval_`, and over those of named sets, `eval_NAME_`; and
        what each pair got: (n, len(COLUMNS)) fp64, by pair id, of all ranks on every rank.
    """
    names = loss.names_of_parts
    totals = torch.zeros(len(sets), 8 + len(names), dtype=torch.float64, device=world.device)
    parts = [torch.zeros(0, len(COLUMNS), dtype=torch.float64, device=world.device)]
    ranks_a_row = 1 if policy.scorer.across is None else policy.scorer.across.size
    for place, share in enumerate(sets.values()):
        scored = look_ahead(policy, reference, share.batches, world.device, share.answers)
        if not share.answers and "tdpo" not in loss.config.names:  # of all tokens they would fill the memory
            share.answers.extend(of_reference for _, of_reference in scored)
        contexts = contexts_of(loss, share.batches, scored, share.chosen_length, world, ranks_a_row, is_step=False)
        for batch, (policy_logps, reference_logps), context in zip(share.batches, scored, contexts, strict=True):
            output = loss(policy_logps, reference_logps, context)
            totals[place] += sums(output, policy_logps)
            known = reference_logps if loss.needs_reference else None
            parts.append(_by_pair(batch, output, policy_logps, known))
    totals = distributed.sum_over_ranks(totals)
    found = {f"eval_{key}": value for key, value in averages(totals.sum(dim=0), names).items()}
    for name, own in zip(sets, totals, strict=True):
        if name:
            found |= {f"eval_{name}_{key}": value for key, value in averages(own, names).items()}
    # Ranks that compute a row together all know its pairs.
    of_groups = distributed.gather(torch.cat(parts).cpu().numpy())[::ranks_a_row]
    pairs = np.concatenate(of_groups)
    return found, pairs[np.argsort(pairs[:, 0])]


def _by_pair(batch: PackedBatch, output: LossOutput, policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """(P, len(COLUMNS)) fp64 on the device, in the order of COLUMNS; NaN for what no reference has said."""
    unknown = torch.full_like(policy.chosen, torch.nan)
    columns = (
        torch.tensor(batch.pair_ids, dtype=torch.float64, device=policy.chosen.device),
        output.losses,
        output.chosen_rewards,
        output.rejected_rewards,
        policy.chosen,
        policy.rejected,
        unknown if reference is None else reference.chosen,
        unknown if reference is None else reference.rejected,
        policy.chosen_lengths,
        policy.rejected_lengths,
    )
    return torch.stack([column.double() for column in columns], dim=1)
