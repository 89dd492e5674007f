"""Step number -> this rank's micro-batches, built one step ahead in a thread.

The loader's whole state is the step number: a resumed run asks for the next step and gets the very batches the
uninterrupted run would have had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from dpo.data.batch import collate
from dpo.data.epochs import Epochs
from dpo.data.mixture import Pairs
from dpo.data.planner import Costs, Layout, Plan, num_tokens, plan_batch
from dpo.types import PackedBatch, TokenizedPair


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one rank does in one optimizer step.

    Attributes:
        step: Counted from 0.
        batches: This rank's micro-batches; as many on every rank.
        num_pairs: Pairs of the step over all ranks: what its loss is divided by.
        num_target_tokens: Scored tokens of chosen completions over all ranks: what an SFT loss is divided by.
        num_tokens: Useful tokens (2P+C+R a pair) of the step over all ranks.
        waited: Seconds that training stood still until they were built.
    """

    step: int
    batches: list[PackedBatch]
    num_pairs: int
    num_target_tokens: int
    num_tokens: int
    waited: float = 0.0

    @property
    def chosen_length(self) -> float:
        """Mean scored tokens of chosen completions, over all ranks."""
        return self.num_target_tokens / self.num_pairs


@dataclass(frozen=True, slots=True)
class Loader:
    """The micro-batches of one rank.

    Attributes:
        dataset: Tokenised pairs.
        epochs: Which pairs make which step.
        rank, world_size: Whose micro-batches.
        layout, token_budget, max_pairs: See `planner.plan_batch`.
        row_tokens: Length to which packed rows are filled by a dummy tail; None for none. See `with_fixed_rows`.
        pin_memory: Pin the tensors, so that the host need not wait while they are copied to a GPU.
        token_weights: token_weights(step, pair) -> what the tokens of its completions count; None: 1 each.
        costs: Of the model, by which ranks get equal work.
    """

    dataset: Pairs
    epochs: Epochs
    rank: int
    world_size: int
    layout: Layout
    token_budget: int
    max_pairs: int | None = None
    row_tokens: int | None = None
    pin_memory: bool = False
    token_weights: Callable[[int | None, TokenizedPair], tuple[np.ndarray, np.ndarray]] | None = None
    costs: Costs = Costs()

    def __getitem__(self, step: int) -> StepBatches:
        """Build the micro-batches of a step, counted from 0."""
        ids = self.epochs.batch(step)
        return StepBatches(
            step=step,
            batches=[self.build(pair_ids, step) for pair_ids in self.share_of(ids)],
            num_pairs=len(ids),
            num_target_tokens=int(self.dataset.targets[ids, 0].sum()),
            num_tokens=int(num_tokens(self.dataset.lengths[ids], "packed").sum()),
        )

    def share_of(self, pair_ids: Sequence[int] | np.ndarray) -> list[list[int]]:
        """This rank's micro-batches, as pair ids, of pairs that all ranks score together."""
        return self.plan_of(pair_ids)[self.rank]

    def plan_of(self, pair_ids: Sequence[int] | np.ndarray) -> Plan:
        """The same of all ranks."""
        return plan_batch(
            pair_ids,
            self.dataset.lengths,
            world_size=self.world_size,
            token_budget=self.token_budget,
            layout=self.layout,
            max_pairs=self.max_pairs,
            costs=self.costs,
        )

    def build(self, pair_ids: list[int], step: int | None = None) -> PackedBatch:
        """Lay out the pairs of a micro-batch; a step is named in training alone."""
        pairs = [self.dataset[i] for i in pair_ids]
        weights = None if self.token_weights is None else [self.token_weights(step, pair) for pair in pairs]
        batch = collate(pairs, self.layout, weights, self.row_tokens)
        return batch.pin() if self.pin_memory else batch

    def steps(self, start: int, stop: int) -> Iterator[StepBatches]:
        """Steps start..stop-1 in order, each built while the one before is computed."""
        if start >= stop:
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            ahead = pool.submit(self.__getitem__, start)
            for step in range(start, stop):
                started = time.perf_counter()
                ready = ahead.result()
                waited = time.perf_counter() - started
                if step + 1 < stop:
                    ahead = pool.submit(self.__getitem__, step + 1)
                yield replace(ready, waited=waited)


def with_fixed_rows(
    loader: Loader, heaviest: Sequence[Sequence[int] | np.ndarray], usual: Sequence[Sequence[int] | np.ndarray]
) -> tuple[Loader, float]:
    """A loader whose packed rows all have one length, so that kernels and compiled code see one shape.

    The length is that of the longest micro-batch of the heaviest steps, or of the longest pair; it becomes the budget,
    so that no other micro-batch is longer.

    Args:
        loader: Of a packed layout.
        heaviest, usual: Pair ids of a few steps, the same on every rank.
    Returns:
        The loader, and the share of its tokens in the usual steps that are dummy tail.
    """
    cost = num_tokens(loader.dataset.lengths, loader.layout)

    def sizes(steps: Sequence[Sequence[int] | np.ndarray]) -> list[int]:
        return [int(cost[ids].sum()) for together in steps for rank in loader.plan_of(together) for ids in rank]

    row, of_usual = max(*sizes(heaviest), int(cost.max())), sizes(usual)
    return replace(loader, token_budget=row, row_tokens=row), 1 - sum(of_usual) / (row * len(of_usual))


def whole_pass(loader: Loader, pair_ids: Sequence[int]) -> list[PackedBatch]:
    """This rank's micro-batches of one pass in which each of some pairs is scored exactly once (an evaluation)."""
    return [loader.build(ids) for ids in loader.share_of(pair_ids)]
