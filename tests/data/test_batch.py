"""Layouts of two known pairs against literal tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo.data.batch import collate
from dpo.types import Segment, TokenizedPair


def test_margins_come_along_and_are_nan_where_the_data_is_silent():
    pairs = [replace(PAIRS[0], margin=2.5), PAIRS[1]]
    for layout in ("shared", "packed", "padded", "chosen"):
        margins = collate(pairs, layout).margins
        assert margins.dtype == torch.float32 and margins[0] == 2.5 and margins[1].isnan()
    assert collate([], "shared").margins.shape == (0,)


def pair(pair_id: int, *parts: list[int]) -> TokenizedPair:
    return TokenizedPair(pair_id, *(np.array(p, dtype=np.int32) for p in parts))


PAIRS = [pair(7, [1, 2], [3, 4, 5], [6]), pair(9, [8], [9], [10, 11])]


def test_shared_stores_the_prompt_once_and_restarts_the_rejected_positions_after_it():
    batch = collate(PAIRS, "shared")
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 1, 2]
    assert batch.segments.items == (Segment(0, 5), Segment(5, 6, 0, 2), Segment(6, 8), Segment(8, 10, 6, 7))
    assert batch.score_index.tolist() == [1, 2, 3, 6, 1, 6, 8]
    assert batch.target_ids.tolist() == [3, 4, 5, 9, 6, 10, 11]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert (batch.pair_ids, batch.num_rows, batch.num_sequences) == ((7, 9), 1, 4)
    assert batch.completion_lengths.tolist() == [3, 1, 1, 2]
    assert (batch.num_useful_tokens, batch.num_padding_tokens) == (13, 0)


def test_packed_repeats_the_prompt():
    batch = collate(PAIRS, "packed")
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 6, 8, 9, 8, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.segments.items == (Segment(0, 5), Segment(5, 8), Segment(8, 10), Segment(10, 13))
    assert batch.score_index.tolist() == [1, 2, 3, 8, 6, 10, 11]
    assert (batch.num_useful_tokens, batch.num_padding_tokens) == (13, 0)


def test_padded_has_chosen_rows_first_and_padding_on_the_right():
    batch = collate(PAIRS, "padded")
    assert batch.input_ids.view(4, 5).tolist() == [[1, 2, 3, 4, 5], [8, 9, 0, 0, 0], [1, 2, 6, 0, 0], [8, 10, 11, 0, 0]]
    assert batch.score_index.tolist() == [1, 2, 3, 5, 11, 15, 16]
    assert batch.segments is None
    assert (batch.num_useful_tokens, batch.num_padding_tokens) == (13, 7)


@pytest.mark.parametrize(("layout", "rows"), [("chosen", 1), ("padded_chosen", 2)])
def test_sft_batches_hold_the_chosen_completions_alone(layout, rows):
    batch = collate(PAIRS, layout)
    assert batch.target_ids.tolist() == [3, 4, 5, 9]
    assert (batch.num_rows, batch.num_sequences, batch.num_useful_tokens) == (rows, 2, 7)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded", "chosen", "padded_chosen"])
def test_targets_are_what_follows_the_rows_that_predict_them(layout):
    batch = collate(PAIRS[:1], layout)
    ids = batch.input_ids.tolist()
    predicted = [ids[row] for row in batch.score_index.tolist()]
    assert predicted[:3] == [2, 3, 4]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_no_pairs_give_two_dummy_tokens_that_score_nothing(layout):
    batch = collate([], layout)
    assert batch.input_ids.numel() == 2
    assert len(batch.score_index) == len(batch.pair_ids) == batch.num_sequences == batch.num_useful_tokens == 0
    assert batch.num_padding_tokens == 2


@pytest.mark.parametrize(("layout", "useful"), [("shared", 13), ("packed", 13), ("padded", 13), ("chosen", 6)])
def test_what_is_not_scored_is_computed_and_counted_all_the_same(layout, useful):
    whole = pair(0, [1, 2, 3], [4, 5, 6], [7, 8, 9, 1])
    some = replace(whole, chosen_scored=np.array([True, False, True]))
    batch, other = collate([some], layout), collate([whole], layout)
    assert batch.num_useful_tokens == other.num_useful_tokens == useful
    assert batch.input_ids.tolist() == other.input_ids.tolist()
    assert batch.target_ids.tolist()[:2] == [4, 6] and batch.completion_sizes[0] == 2
    assert batch.score_index.tolist() == [i for n, i in enumerate(other.score_index.tolist()) if n != 1]
