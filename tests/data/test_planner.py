"""Plans score each pair of a batch once, at near-equal cost, the same on every rank."""

from __future__ import annotations

import threading
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo.data.epochs import Epochs
from dpo.data.loader import Loader, whole_pass
from dpo.data.planner import Costs, num_tokens, plan_batch
from tests import tiny

LAYOUTS = ("shared", "packed", "padded", "chosen", "padded_chosen")


def size(ids: list[int], lengths: np.ndarray, layout: str) -> int:
    """Tokens of a micro-batch, counted from the layouts' definitions."""
    p, c, r = lengths[ids].T
    if layout == "shared":
        return int((p + c + r).sum())
    if layout == "packed":
        return int((2 * p + c + r).sum())
    if layout == "chosen":
        return int((p + c).sum())
    if layout == "padded_chosen":
        return int(len(ids) * (p + c).max())
    return int(2 * len(ids) * (p + np.maximum(c, r)).max())


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.tuples(*[st.integers(1, 60)] * 3), min_size=1, max_size=40),
    world_size=st.integers(1, 5),
    budget=st.integers(1, 300),
    max_pairs=st.none() | st.integers(1, 4),
    layout=st.sampled_from(LAYOUTS),
    costs=st.builds(Costs, st.integers(0, 10**6), st.integers(0, 10**5)),
)
@example([(1, 1, 1)], 1, 300, None, "shared", Costs())  # a pair of one token each, alone
@example([(1, 1, 1)], 5, 300, None, "shared", Costs())  # more ranks than pairs
@example([(60, 60, 60), (1, 1, 1)], 2, 20, None, "shared", Costs())  # longer than the budget
def test_any_plan_scores_each_pair_once_within_the_budget(lengths, world_size, budget, max_pairs, layout, costs):
    table = np.array(lengths, dtype=np.int64)
    plan = plan_batch(
        range(len(table)), table, world_size=world_size, token_budget=budget, layout=layout, max_pairs=max_pairs,
        costs=costs,
    )
    assert sorted(i for rank in plan for ids in rank for i in ids) == list(range(len(table)))
    assert len(plan) == world_size
    assert len({len(rank) for rank in plan}) == 1
    for ids in (ids for rank in plan for ids in rank if ids):
        assert len(ids) == 1 or size(ids, table, layout) <= budget
        assert max_pairs is None or len(ids) <= max_pairs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_one_pair_are_those_of_its_batch(layout):
    lengths = np.array([[3, 5, 2], [1, 1, 1]])
    assert [size([i], lengths, layout) for i in (0, 1)] == num_tokens(lengths, layout).tolist()


def test_ranks_get_near_equal_work():
    lengths = np.random.default_rng(0).geometric(0.01, (256, 3)).clip(1, 1024)
    plan = plan_batch(range(256), lengths, world_size=8, token_budget=10**9, layout="shared")
    loads = [size(rank[0], lengths, "shared") for rank in plan]
    assert max(loads) / np.mean(loads) < 1.01


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_is_a_permutation_cut_in_order_whatever_the_ranks(world_size):
    pairs = tiny.Pairs(tiny.pairs(23))
    epochs = Epochs(23, 5, seed=3)
    seen = []
    for step in range(2 * epochs.steps_per_epoch):
        ranks = [Loader(pairs, epochs, r, world_size, "shared", 60)[step] for r in range(world_size)]
        ids = sorted(i for work in ranks for batch in work.batches for i in batch.pair_ids)
        assert ids == sorted(epochs.batch(step).tolist())
        assert {work.num_pairs for work in ranks} == {len(ids)}
        seen.append(ids)
    assert [len(ids) for ids in seen] == [5, 5, 5, 5, 3] * 2
    for epoch in (seen[:5], seen[5:]):
        assert sorted(sum(epoch, [])) == list(range(23))
    assert seen[:5] != seen[5:]


def test_seed_and_epoch_decide_the_order_and_shuffle_off_keeps_the_files():
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        return Epochs(50, 8, seed, shuffle).order(epoch).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0) != order(0, 1)
    assert order(0, 3, shuffle=False) == list(range(50))


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_an_evaluation_scores_every_pair_once_with_more_ranks_than_pairs_too(world_size):
    pairs = tiny.Pairs(tiny.pairs(11))
    batches = [
        whole_pass(Loader(pairs, Epochs(5, 2, 0), r, world_size, "shared", 50), range(11)) for r in range(world_size)
    ]
    assert sorted(i for rank in batches for batch in rank for i in batch.pair_ids) == list(range(11))
    assert len({len(rank) for rank in batches}) == 1


def test_the_next_step_is_built_in_a_thread_while_one_is_computed():
    class Watched(tiny.Pairs):
        read: dict[int, str] = {}

        def __getitem__(self, pair_id):
            self.read[pair_id] = threading.current_thread().name
            return super().__getitem__(pair_id)

    pairs = Watched(tiny.pairs(23))
    loader = Loader(pairs, Epochs(23, 5, 0), 0, 1, "shared", 60)
    steps, second = loader.steps(0, 3), loader.epochs.batch(1).tolist()
    assert next(steps).step == 0
    end = time.monotonic() + 10
    while not set(second) <= pairs.read.keys() and time.monotonic() < end:
        time.sleep(0.01)
    assert all(pairs.read[i].startswith("loader") for i in second)


def test_what_goes_to_a_gpu_is_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor)
    loader = Loader(tiny.Pairs(tiny.pairs(5)), Epochs(5, 5, 0), 0, 1, "shared", 600)
    (batch,) = replace(loader, pin_memory=True)[0].batches
    tensors = [x for record in (batch, batch.segments) for x in vars_of(record) if isinstance(x, torch.Tensor)]
    assert len(tensors) > 10 and {x.data_ptr() for x in tensors} <= set(pinned)
    pinned.clear()
    assert loader[0].batches and not pinned


def vars_of(record):
    return [getattr(record, field.name) for field in fields(record)]


def test_prefetched_steps_are_those_asked_for():
    loader = Loader(tiny.Pairs(tiny.pairs(23)), Epochs(23, 5, 0), 0, 2, "packed", 60)
    assert [work.step for work in loader.steps(2, 7)] == [2, 3, 4, 5, 6]
    assert list(loader.steps(7, 7)) == []
    for work in loader.steps(2, 4):
        assert [b.pair_ids for b in work.batches] == [b.pair_ids for b in loader[work.step].batches]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_heaviest_steps_are_those_with_the_most_over_all_epochs(shuffle):
    cost = np.random.default_rng(1).integers(1, 1000, 23)
    epochs = Epochs(23, 4, seed=3, shuffle=shuffle)
    for steps in (1, 5, 6, 7, 15):
        totals = [int(cost[epochs.batch(step)].sum()) for step in range(steps)]
        found = epochs.heaviest(cost, steps, 3)
        assert len(found) == min(3, steps) == len(set(found)) and found == sorted(found)
        assert sorted((totals[step] for step in found), reverse=True) == sorted(totals, reverse=True)[:3]
