"""Micro-batches at a fixed length: every pair once, no row of another shape, whatever the lengths and ranks."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.epochs import Epochs
from dpo.data.loader import Loader, whole_pass, with_fixed_rows
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.types import TokenizedPair
from tests import tiny


def loader_over(lengths, *, rank=0, world_size=1, batch=4, budget=20, layout="shared") -> Loader:
    rng = np.random.default_rng(0)
    ids = [[rng.integers(1, tiny.VOCAB, n).astype(np.int32) for n in three] for three in lengths]
    dataset = tiny.Pairs([TokenizedPair(i, *three) for i, three in enumerate(ids)])
    return Loader(dataset, Epochs(len(lengths), batch, seed=0), rank, world_size, layout, budget)


def fixed(loader: Loader) -> Loader:
    epochs = loader.epochs
    steps = [epochs.batch(step) for step in range(epochs.steps_per_epoch)]
    return with_fixed_rows(loader, steps, steps)[0]


LENGTHS = st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, world_size=st.integers(1, 5), budget=st.integers(1, 40), batch=st.integers(1, 9),
       layout=st.sampled_from(["shared", "packed"]))  # fmt: skip
def test_all_rows_have_one_length_and_every_pair_is_scored_once(lengths, world_size, budget, batch, layout):
    loaders = [
        fixed(loader_over(lengths, rank=rank, world_size=world_size, budget=budget, batch=batch, layout=layout))
        for rank in range(world_size)
    ]
    steps = range(loaders[0].epochs.steps_per_epoch)
    in_steps = [[batch for step in steps for batch in x[step].batches] for x in loaders]
    passes = in_steps, [whole_pass(x, range(len(lengths))) for x in loaders]
    for batches in passes:
        assert len({len(of_rank) for of_rank in batches}) == 1
        every = [batch for of_rank in batches for batch in of_rank]
        row = loaders[0].row_tokens
        assert {(b.num_rows, len(b.input_ids), len(b.position_ids)) for b in every} == {(1, row, row)}
        assert sorted(i for b in every for i in b.pair_ids) == list(range(len(lengths)))
        useful = sum(p + p + c + r for p, c, r in lengths)
        assert sum(b.num_useful_tokens for b in every) == useful
        stored = sum((p if layout == "shared" else 2 * p) + c + r for p, c, r in lengths)
        assert sum(b.num_padding_tokens for b in every) == row * len(every) - stored


def test_the_row_is_as_long_as_the_longest_micro_batch_or_pair_and_the_tail_is_told():
    lengths = [(2, 2, 2)] * 5  # 4 + 1 pairs a step: 24 and 6 tokens
    steps = [range(4), range(4, 5)]
    loader, tail = with_fixed_rows(loader_over(lengths, budget=100), steps[:1], steps)
    assert (loader.row_tokens, loader.token_budget) == (24, 24)
    assert tail == pytest.approx(1 - 30 / 48)
    longer, _ = with_fixed_rows(loader_over([*lengths, (20, 20, 20)], budget=10), [range(4)], [range(4)])
    assert longer.row_tokens == 60


def scores(scorer, batches):
    """Log-probs by pair, and the gradient of their weighted sum over all micro-batches."""
    scorer.zero_grad()
    found = {}
    for batch in batches:
        chosen, rejected = scorer(batch).tensor_split(2)
        for i, pair in enumerate(batch.pair_ids):
            found[pair] = (chosen[i].item(), rejected[i].item())
        ((pair_weights(batch) * chosen).sum() - (2 * pair_weights(batch) * rejected).sum()).backward()
    return [found[i] for i in sorted(found)], [p.grad.clone() for p in scorer.parameters() if p.grad is not None]


def pair_weights(batch):
    return torch.tensor([1.0 + i for i in batch.pair_ids], dtype=torch.float64)


MODELS = {family: tiny.model(family) for family in ("gpt2", "llama", "qwen3")}


@settings(max_examples=20, deadline=None)
@given(
    lengths=LENGTHS, world_size=st.integers(1, 4), budget=st.integers(1, 60), chunk=st.integers(1, 30),
    family=st.sampled_from(sorted(MODELS)), backend=st.sampled_from(["sdpa", "varlen_eager", "flex_eager"]),
)
def test_budgets_ranks_shapes_chunks_and_kernels_change_neither_log_probs_nor_gradients(
    lengths, world_size, budget, chunk, family, backend
):
    """Prompts and completions of one token, a pair longer than the budget, more ranks than pairs among the cases."""
    plain = Scorer(MODELS[family])
    use_layout(plain, "shared")
    everything = loader_over(lengths, batch=len(lengths), budget=10_000)
    truth_logps, truth = scores(plain, everything[0].batches)
    scorer = Scorer(MODELS[family], chunk_rows=chunk)
    use_layout(scorer, "shared", backend=backend)
    share = {"world_size": world_size, "batch": len(lengths), "budget": budget}
    ranks = [loader_over(lengths, rank=rank, **share) for rank in range(world_size)]
    for made in (lambda x: x, fixed):
        logps, found = scores(scorer, [b for rank in ranks for b in made(rank)[0].batches])
        torch.testing.assert_close(logps, truth_logps, rtol=1e-9, atol=1e-9)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_rank_without_pairs_computes_a_row_of_the_same_shape_that_scores_nothing():
    loader = fixed(loader_over([(3, 2, 4)], rank=1, world_size=3))
    (batch,) = loader[0].batches
    assert (batch.pair_ids, len(batch.input_ids), batch.num_padding_tokens) == ((), 9, 9)
    assert replace(loader, rank=0)[0].batches[0].num_padding_tokens == 0


def test_a_step_says_how_long_training_stood_still_for_it(monkeypatch):
    """The first is waited for, the second is built while the first is computed."""
    loader, build = loader_over([(3, 2, 2)] * 8), Loader.__getitem__

    def slow(self, step):
        time.sleep(0.2)
        return build(self, step)

    monkeypatch.setattr(Loader, "__getitem__", slow)
    waited = []
    for step in loader.steps(0, 2):
        waited.append(step.waited)
        time.sleep(0.4)
    assert 0.15 < waited[0] < 0.4 and waited[1] < 0.1
