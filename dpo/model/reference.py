"""The frozen reference: PackedBatch -> PairLogps without gradient, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpo.model.forward import pair_logps
from dpo.types import PackedBatch, PairLogps

Reference = Callable[[PackedBatch], PairLogps]


def online(score: Callable[[PackedBatch], Tensor]) -> Reference:
    """Score every batch with a frozen model, in one forward pass.

    Args:
        score: A Scorer around the frozen copy, or the engine that shards it.
    Returns:
        reference(batch) -> PairLogps.
    """

    @torch.no_grad()
    def reference(batch: PackedBatch) -> PairLogps:
        return pair_logps(score, batch)

    return reference


def from_scores(scores: Tensor, device: torch.device) -> Reference:
    """Look up what the reference said of every pair of a data set.

    Args:
        scores: (n, 2) fp32: summed log-probs of chosen and rejected, nats, by pair id.
        device: Where they are wanted.
    Returns:
        reference(batch) -> PairLogps.
    """
    here = scores.to(device)

    def reference(batch: PackedBatch) -> PairLogps:
        chosen, rejected = here[list(batch.pair_ids)].unbind(1)
        chosen_lengths, rejected_lengths = batch.completion_lengths.tensor_split(2)
        return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)

    return reference


def remembered(reference: Reference) -> Callable[[int, PackedBatch], PairLogps]:
    """Score each batch of a fixed list once and remember the answer: validation pairs never change.

    Args:
        reference: What scores a batch the first time.
    Returns:
        reference(index, batch) -> PairLogps.
    """
    known: dict[int, PairLogps] = {}

    def lookup(index: int, batch: PackedBatch) -> PairLogps:
        if index not in known:
            known[index] = reference(batch)
        return known[index]

    return lookup
