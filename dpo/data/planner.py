"""Lengths -> who scores what: which pairs make a step, and which rank scores them in which micro-batch.

Everything here is a pure function of (seed, step) and of the pairs' lengths, so all ranks agree without talking. The
pairs of a step are the semantics of a run; how they are spread over ranks and micro-batches is scheduling and never
changes the gradient. All ranks get the same number of micro-batches, a short rank empty ones, because ZeRO-3 gathers
weights in every forward pass of every rank.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Layout = Literal["shared", "packed", "padded", "chosen", "padded_chosen"]
"""How a micro-batch is laid out; the last two hold prompt + chosen alone (SFT), packed or padded."""

Plan = list[list[list[int]]]
"""plan[rank][micro_step]: pair ids."""


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


def num_tokens(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens that each pair adds to a packed row.

    Args:
        lengths: (n, 3) int64: prompt, chosen, rejected.
        layout: For `padded`: the tokens of both rows at the pair's own longer length.
    Returns:
        (n,) int64.
    """
    prompt, chosen, rejected = lengths[:, 0], lengths[:, 1], lengths[:, 2]
    if layout == "shared":
        return prompt + chosen + rejected
    if layout == "packed":
        return 2 * prompt + chosen + rejected
    if layout in ("chosen", "padded_chosen"):
        return prompt + chosen
    return 2 * (prompt + np.maximum(chosen, rejected))


@dataclass(frozen=True, slots=True)
class Costs:
    """What tokens cost beside their way through the body, in millionths of that: whole numbers, so that ranks agree.

    Attributes:
        completion: The logits of a completion token: H V / N_body.
        product: A query-key product: 2 (heads x head size, summed over layers) / N_body.
    """

    completion: int = 0
    product: int = 0


def attention_products(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Query-key products that each pair asks for, causally.

    Args:
        lengths: (n, 3) int64: P, C, R.
        layout: shared computes the prompt's once; packed and padded twice.
    Returns:
        (n,) int64.
    """
    prompt, chosen, rejected = lengths.astype(np.int64).T
    first, second = prompt + chosen, prompt + rejected
    first, second = first * (first + 1) // 2, second * (second + 1) // 2
    if layout in ("chosen", "padded_chosen"):
        return first
    return first + second - (prompt * (prompt + 1) // 2 if layout == "shared" else 0)


def pair_costs(lengths: np.ndarray, layout: Layout, costs: Costs) -> np.ndarray:
    """What each pair costs: its tokens, the logits of its completions, its attention.

    Returns:
        (n,) int64, millionths of a token's way through the body.
    """
    scored = lengths[:, 1] if layout in ("chosen", "padded_chosen") else lengths[:, 1:].sum(axis=1)
    beside = costs.completion * scored + costs.product * attention_products(lengths, layout)
    return 1_000_000 * num_tokens(lengths, layout) + beside


@dataclass(slots=True)
class _Bin:
    """A micro-batch being filled."""

    pair_ids: list[int]
    tokens: int = 0
    widest: int = 0

    def tokens_with(self, tokens: int, layout: Layout) -> int:
        """Size of the micro-batch if a pair of `tokens` tokens joined."""
        if not layout.startswith("padded"):
            return self.tokens + tokens
        return (len(self.pair_ids) + 1) * max(self.widest, tokens)

    def add(self, pair_id: int, tokens: int, layout: Layout) -> None:
        self.tokens = self.tokens_with(tokens, layout)
        self.widest = max(self.widest, tokens)
        self.pair_ids.append(pair_id)


EVEN_ENOUGH = 1.001
"""Costliest rank over the mean at which nothing more is exchanged between ranks."""


def _spread_over_ranks(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Indices of each rank's pairs: LPT, the costliest pair first, always to the rank with the least work (Graham
    1969, doi:10.1137/0117039), then exchanges."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    heap = [(0, 0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for i in order:
        load, count, rank = heapq.heappop(heap)
        shares[rank].append(i)
        heapq.heappush(heap, (load + costs[i], count + 1, rank))
    _exchange(shares, costs)
    return shares


def _exchange(shares: list[list[int]], costs: Sequence[int]) -> None:
    """Swap pairs between the rank with the most work and one of those with the least, while that evens them out.

    Stops where no rank has more than EVEN_ENOUGH of the mean, or the costliest pair alone makes the costliest rank:
    no assignment of whole pairs is better. At 8 pairs a rank of HH-RLHF it takes LPT's 1.2 % down to 0.3 %.
    """
    loads = [sum(costs[i] for i in share) for share in shares]
    enough = max(max(costs, default=0), EVEN_ENOUGH * sum(loads) / len(shares))
    by_load = sorted((load, rank) for rank, load in enumerate(loads))
    for _ in range(8 * len(shares)):
        most, heavy = by_load[-1]
        if most <= enough:
            return
        for least, light in by_load[:4]:
            found = _best_swap(shares[heavy], shares[light], costs, most - least)
            if found is not None:
                break
        else:
            return
        give, take = found
        moved = costs[give] - (0 if take is None else costs[take])
        shares[heavy].remove(give)
        shares[light].append(give)
        if take is not None:
            shares[light].remove(take)
            shares[heavy].append(take)
        by_load.pop()
        by_load.remove((least, light))
        insort(by_load, (most - moved, heavy))
        insort(by_load, (least + moved, light))


def _best_swap(
    heavy: list[int], light: list[int], costs: Sequence[int], gap: int
) -> tuple[int, int | None] | None:
    """The pair to give and the pair to take for it (None: nothing) that leave two ranks most alike; None if none do."""
    offers = sorted((costs[i], i) for i in light)
    best, swap = gap, None
    for give in heavy:
        at = bisect_left(offers, (costs[give] - gap / 2, 0))
        candidates: list[tuple[int, int | None]] = [*offers[max(0, at - 1) : at + 1], (0, None)]
        for cost, take in candidates:
            left = abs(gap - 2 * (costs[give] - cost))
            if left < best:
                best, swap = left, (give, take)
    return swap


def _into_micro_batches(
    share: list[int], tokens: Sequence[int], layout: Layout, budget: int, max_pairs: int | None
) -> list[_Bin]:
    """Best-fit-decreasing of one rank's pairs under the budget; a pair longer than the budget stands alone.

    For padded layouts, next-fit over pairs sorted by length, so that equals are padded together.
    """
    share = sorted(share, key=lambda i: (-tokens[i], i))
    bins: list[_Bin] = []
    room: list[tuple[int, int]] = []  # tokens left in a bin that takes more pairs, its number; sorted
    for i in share:
        if layout.startswith("padded"):
            fits = bool(bins) and bins[-1].tokens_with(tokens[i], layout) <= budget
            place = len(bins) - 1 if fits and len(bins[-1].pair_ids) != max_pairs else len(bins)
        else:
            at = bisect_left(room, (tokens[i], 0))
            place = room.pop(at)[1] if at < len(room) else len(bins)
        if place == len(bins):
            bins.append(_Bin([]))
        chosen = bins[place]
        chosen.add(i, tokens[i], layout)
        if chosen.tokens < budget and len(chosen.pair_ids) != max_pairs:
            insort(room, (budget - chosen.tokens, place))
    return bins


def plan_batch(
    pair_ids: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    *,
    world_size: int,
    token_budget: int,
    layout: Layout,
    max_pairs: int | None = None,
    costs: Costs = Costs(),
) -> Plan:
    """Spread pairs over ranks at near-equal cost, and each rank's over micro-batches.

    Args:
        pair_ids: Pairs to score, each once.
        lengths: (n, 3) int64 of the whole data set, indexed by pair id.
        world_size: Ranks, >= 1.
        token_budget: Largest number of tokens in a micro-batch of one rank; a longer pair stands alone.
        layout: Decides how many tokens a pair has.
        max_pairs: Largest number of pairs in a micro-batch.
        costs: Of the model; by default a pair costs its tokens.
    Returns:
        plan[rank][micro_step] -> pair ids; the same number of micro-steps on every rank, at least one.
    """
    ids = [int(i) for i in pair_ids]
    tokens = [int(t) for t in num_tokens(lengths[ids], layout)] if ids else []
    cost = [int(c) for c in pair_costs(lengths[ids], layout, costs)] if ids else []
    shares = _spread_over_ranks(cost, world_size)
    packed = [_into_micro_batches(share, tokens, layout, token_budget, max_pairs) for share in shares]
    micro_steps = max(1, *(len(bins) for bins in packed))
    return [
        [sorted(ids[i] for i in b.pair_ids) for b in bins] + [[] for _ in range(micro_steps - len(bins))]
        for bins in packed
    ]
