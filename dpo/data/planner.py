"""Lengths -> who scores what: which rank scores which pairs of a step, in which micro-batch.

Everything here is a pure function of the pairs' lengths, so all ranks agree without talking. The pairs of a step
(epochs.py) are the semantics of a run; how they are spread over ranks and micro-batches is scheduling and never changes
the gradient. All ranks get the same number of micro-batches, a short rank empty ones, because ZeRO-3 gathers
weights in every forward pass of every rank.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Layout = Literal["shared", "packed", "padded", "chosen", "padded_chosen"]
"""How a micro-batch is laid out; the last two hold prompt + chosen alone (SFT), packed or padded."""

Plan = list[list[list[int]]]
"""plan[rank][micro_step]: pair ids."""


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
    """One rank's pairs under the budget; a pair longer than it stands alone. The longest first."""
    share = sorted(share, key=lambda i: (-tokens[i], i))
    pack = _next_fit if layout.startswith("padded") else _best_fit
    return pack(share, tokens, layout, budget, max_pairs)


def _next_fit(
    share: list[int], tokens: Sequence[int], layout: Layout, budget: int, max_pairs: int | None
) -> list[_Bin]:
    """Pairs in order, so that equals are padded together."""
    bins: list[_Bin] = []
    for i in share:
        is_full = not bins or bins[-1].tokens_with(tokens[i], layout) > budget or len(bins[-1].pair_ids) == max_pairs
        if is_full:
            bins.append(_Bin([]))
        bins[-1].add(i, tokens[i], layout)
    return bins


def _best_fit(
    share: list[int], tokens: Sequence[int], layout: Layout, budget: int, max_pairs: int | None
) -> list[_Bin]:
    """Each pair into the fullest bin that still takes it."""
    bins: list[_Bin] = []
    room: list[tuple[int, int]] = []  # tokens left in a bin that takes more pairs, its number; sorted
    for i in share:
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
