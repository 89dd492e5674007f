"""The order in which pairs are seen: which pairs make which step, a pure function of (seed, step)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class Epochs:
    """The order in which pairs are seen.

    Attributes:
        num_pairs: Pairs of an epoch, and of the data set, >= 1.
        global_batch_size: Pairs per step; the last step of an epoch takes what is left.
        seed: With the epoch's number decides its permutation.
        shuffle: False keeps the file's order.
        parts: Of a weighted mixture: pairs of every source, and how many of them an epoch takes. Pass after pass over a
            source, each in an order drawn from (seed, pass, source), is cut into these, so that no pair is seen a
            second time before all others of its source were. Empty where an epoch takes every pair once.
    """

    num_pairs: int
    global_batch_size: int
    seed: int
    shuffle: bool = True
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return math.ceil(self.num_pairs / self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(num_pairs,) int64: the pair ids of an epoch, counted from 0, in order."""
        return _order(self, epoch)

    def batch(self, step: int) -> np.ndarray:
        """Pair ids of one optimizer step.

        Args:
            step: Optimizer step, counted from 0 over the whole run.
        Returns:
            (at most global_batch_size,) int64.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.global_batch_size
        return self.order(epoch)[start : start + self.global_batch_size]

    def heaviest(self, cost: np.ndarray, steps: int, count: int) -> list[int]:
        """The costliest optimizer steps, in order.

        Args:
            cost: (pairs of the data set,) of every pair.
            steps: How many steps there are; steps from 0 on are looked at.
            count: How many to name, at most.
        Returns:
            Step numbers.
        """
        starts = np.arange(0, self.num_pairs, self.global_batch_size)
        epochs = range(-(-steps // self.steps_per_epoch))
        totals = np.concatenate([np.add.reduceat(cost[self.order(epoch)], starts) for epoch in epochs])[:steps]
        return np.sort(np.argsort(-totals, kind="stable")[:count]).tolist()


@lru_cache(maxsize=4)
def _order(epochs: Epochs, epoch: int) -> np.ndarray:
    ids = np.arange(epochs.num_pairs)
    if epochs.parts:
        starts = np.concatenate([[0], np.cumsum([size for size, _ in epochs.parts])])
        taken = [_taken(epochs, source, epoch) for source in range(len(epochs.parts))]
        ids = np.concatenate([start + own for start, own in zip(starts, taken, strict=False)])
    if epochs.shuffle:
        ids = ids[np.random.default_rng((epochs.seed, epoch)).permutation(epochs.num_pairs)]
    ids.flags.writeable = False  # it is handed out again
    return ids


def _taken(epochs: Epochs, source: int, epoch: int) -> np.ndarray:
    """(quota,) int64: what an epoch takes of the endless row of passes over a source."""
    size, quota = epochs.parts[source]
    first, last = epoch * quota // size, -((epoch + 1) * quota // -size)
    # The last number keeps these draws apart from those of whole epochs.
    passes = [
        np.random.default_rng((epochs.seed, number, source, 1)).permutation(size) if epochs.shuffle else np.arange(size)
        for number in range(first, last)
    ]
    return np.concatenate(passes)[epoch * quota - first * size :][:quota]
