"""The frozen reference: PackedBatch -> PairLogps without gradient, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dpo.model.forward import Scorer, pair_logps, sums_by_sequence
from dpo.types import FrozenTokens, PackedBatch, PairLogps

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


def online_with_tokens(scorer: Scorer) -> Reference:
    """Score every batch with a frozen model and keep what it knows of every token, for a KL over the vocabulary.

    Args:
        scorer: Around the frozen copy, whole and scored through the fast head.
    Returns:
        reference(batch) -> PairLogps with `tokens`.
    """

    @torch.no_grad()
    def reference(batch: PackedBatch) -> PairLogps:
        hidden, head = scorer.hidden(batch), scorer.head
        sums = sums_by_sequence(head(hidden, batch.target_ids), batch)
        tokens = FrozenTokens(hidden, head.weight, head.bias, head.logit_map)
        return replace(pair_logps(lambda _: sums, batch), tokens=tokens)

    return reference


def nothing(batch: PackedBatch) -> PairLogps:
    """The reference of a loss that needs none: log-probs of 0, so that log-ratios are log-probs of the policy."""
    zeros = torch.zeros(len(batch.pair_ids), dtype=torch.float32, device=batch.completion_lengths.device)
    chosen_lengths, rejected_lengths = batch.completion_lengths.tensor_split(2)
    return PairLogps(zeros, zeros, chosen_lengths, rejected_lengths)


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
        chosen, rejected = here.index_select(0, batch.pair_index).unbind(1)
        chosen_lengths, rejected_lengths = batch.completion_lengths.tensor_split(2)
        return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)

    return reference
