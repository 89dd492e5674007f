"""What the pairs of a global batch give to one another, gathered over ranks before the first backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo.model.reference import Reference
from dpo.objective.objective import Objective
from dpo.runtime import preemption
from dpo.runtime.distributed import World, gather
from dpo.training.policy import Policy
from dpo.types import Context, PackedBatch, PairLogps

Scored = Sequence[tuple[PairLogps, PairLogps]]
"""Log-probs of policy and reference, per micro-batch."""


@torch.no_grad()
def look_ahead(
    policy: Policy, reference: Reference, batches: Sequence[PackedBatch], device: torch.device,
    known: Sequence[PairLogps] = (),
) -> Scored:
    """Score micro-batches without gradient.

    Args:
        policy, reference: What scores.
        batches: This rank's.
        device: Of the models.
        known: What the reference has said of all batches before; empty where it is to be asked.
    Returns:
        Log-probs of both, which are small: a reference's tokens are left out.
    Raises:
        Preempted: On every rank, if any was asked to stop.
    """
    scored = []
    for index, batch in enumerate(batches):
        preemption.check(device)
        on_device = batch.to(device)
        of_reference = known[index] if known else reference(on_device)
        of_policy = policy.logps(on_device, of_reference)
        scored.append((of_policy, replace(of_reference, tokens=None)))
    return scored


def contexts_of(
    loss: Objective,
    batches: Sequence[PackedBatch],
    scored: Scored | None,
    chosen_length: float,
    world: World,
    ranks_a_row: int,
    *,
    is_step: bool,
) -> list[Context]:
    """The context of every micro-batch of this rank; collective where the loss couples pairs.

    The pairs of all ranks are put in the order of their ids, so that the partners depend neither on the number of ranks
    nor on the plan; equal log-ratios keep that order.

    Args:
        loss: The objective.
        batches: This rank's share of a global batch (or of a whole evaluation).
        scored: Of `look_ahead`; needed only where the loss couples pairs.
        chosen_length: Mean chosen completion tokens a pair, over all ranks.
        world: This rank.
        ranks_a_row: Ranks that compute a row together and all know its pairs; 1 for a row a rank.
        is_step: Whether a step is made of the batch; see `Objective.couple`.
    Returns:
        One context a micro-batch.
    """
    of_data: list[dict[str, Tensor]] = [{} for _ in batches]
    if "odpo" in loss.config.names:
        of_data = [{"odpo": batch.margins[:, None].to(world.device, non_blocking=True)} for batch in batches]
    if not loss.couples:
        return [Context(chosen_length, own) for own in of_data]
    assert scored is not None
    ids = [pair_id for batch in batches for pair_id in batch.pair_ids]
    # Numbers over the patient channel; beside `look_ahead`, where these losses make a step wait for the device.
    shares = gather((ids, torch.cat([_rows(*pair) for pair in scored]).tolist()))[::ranks_a_row]
    order = torch.tensor([i for share_ids, _ in shares for i in share_ids]).argsort(stable=True)
    rows = torch.tensor([row for _, share_rows in shares for row in share_rows], dtype=torch.float64)[order]  # (B, 6)
    chosen, rejected, chosen_lengths, rejected_lengths, of_reference, of_reference_rejected = rows.unbind(dim=1)
    policy = PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)
    reference = PairLogps(of_reference, of_reference_rejected, chosen_lengths, rejected_lengths)
    partners = loss.couple(policy, reference, is_step=is_step)
    before = sum(len(share_ids) for share_ids, _ in shares[: world.rank // ranks_a_row])
    places = order.argsort()[before : before + len(ids)]  # of this rank's pairs in the common order
    of_micro_batches = places.split([len(batch.pair_ids) for batch in batches])
    of_others = [
        {name: of_all[mine].float().to(world.device) for name, of_all in partners.items()} for mine in of_micro_batches
    ]
    return [Context(chosen_length, own | given) for own, given in zip(of_data, of_others, strict=True)]


def _rows(policy: PairLogps, reference: PairLogps) -> Tensor:
    """(P, 6) fp64: log-probs and lengths of the policy, log-probs of the reference."""
    columns = (policy.chosen, policy.rejected, policy.chosen_lengths, policy.rejected_lengths, reference.chosen,
               reference.rejected)
    return torch.stack([column.double() for column in columns], dim=1)
