"""Several tokenised sources as one data set, and how many pairs of each an epoch takes.

A weight is a share: a source with weight w gives w / (sum of weights) of the pairs of an epoch, in whole pairs, and an
epoch has as many pairs as all sources together. So a source may be seen less than once an epoch, or more than once.
Without weights every pair is seen once an epoch. Which pairs come when is `epochs.Epochs`' business.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpo.data.store import TokenizedPairs
from dpo.types import PreferenceRow, TokenizedPair


class Mixture:
    """Tokenised sources one behind the other.

    Attributes:
        parts, names: The sources, and what to call them.
        lengths, targets, row_numbers, margins: As of `TokenizedPairs`, one source behind the other.
        key: Hash of the sources' keys.
    """

    def __init__(self, parts: Sequence[TokenizedPairs], names: Sequence[str]) -> None:
        """Join sources, at least one."""
        self.parts, self.names = list(parts), list(names)
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.targets = np.concatenate([part.targets for part in parts])
        self.row_numbers = np.concatenate([part.row_numbers for part in parts])
        self.margins = np.concatenate([part.margins for part in parts])
        self.key = hashlib.sha256(" ".join(part.key for part in parts).encode()).hexdigest()[:32]
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, pair_id: int) -> tuple[int, int]:
        """Which source a pair is of, and its id there."""
        if not 0 <= pair_id < len(self):
            raise IndexError(f"pair {pair_id} of {len(self)}")
        part = bisect_right(self._starts, pair_id) - 1
        return part, pair_id - self._starts[part]

    def __getitem__(self, pair_id: int) -> TokenizedPair:
        part, own = self._place(pair_id)
        return replace(self.parts[part][own], pair_id=pair_id)

    def texts(self, pair_id: int) -> PreferenceRow | None:
        """Return a pair as it was before tokenisation, as `TokenizedPairs.texts`."""
        part, own = self._place(pair_id)
        return self.parts[part].texts(own)

    def origin(self, pair_id: int) -> str:
        """Name the source and row of a pair."""
        part, own = self._place(pair_id)
        return f"{self.names[part]} {self.parts[part].origin(own)}"


Pairs = TokenizedPairs | Mixture
"""A tokenised data set: of one source or of several."""


def quotas(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many pairs of each source an epoch takes.

    Args:
        sizes: Pairs of every source, >= 1.
        weights: Of every source, > 0, in any unit.
    Returns:
        Whole numbers whose sum is that of `sizes`, in proportion to the weights to within one pair (largest
        remainders), but none below 1.
    """
    total = sum(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    taken = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (taken[i] - exact[i], i))
    for i in by_remainder[: total - sum(taken)]:
        taken[i] += 1
    for i in range(len(sizes)):
        if taken[i] == 0:
            taken[taken.index(max(taken))] -= 1
            taken[i] = 1
    return taken


def share_lines(parts: Sequence[TokenizedPairs], names: Sequence[str], taken: Sequence[int]) -> list[str]:
    """Say what an epoch is made of: pairs and tokens of every source.

    Args:
        parts, names: The sources.
        taken: Pairs of each in an epoch.
    """
    tokens = [count * float(part.lengths.sum(axis=1).mean()) for part, count in zip(parts, taken, strict=True)]
    lines = [f"mixture: {len(parts)} sources, {sum(taken):,} pairs an epoch"]
    for part, name, count, own in zip(parts, names, taken, tokens, strict=True):
        lines.append(
            f"  {name}: {count:,} pairs an epoch, {count / sum(taken):.1%} of the pairs, {own / sum(tokens):.1%} of the"
            f" tokens; each of its {len(part):,} pairs {count / len(part):.2f} times"
        )
    return lines
