"""Mixtures: weights are shares of whole pairs, an epoch follows from seed and number, every pair has its turn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.epochs import Epochs
from dpo.data.mixture import Mixture, quotas, share_lines
from dpo.data.tokenize import TokenizedPairs
from tests.by_path import prepare_pairs
from tests.data.tiny_tokenizers import plain_rows, tokenizer_of


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=6))
def test_quotas_are_whole_add_up_and_are_in_proportion_to_the_weights(given_parts):
    sizes, weights = zip(*given_parts, strict=True)
    taken = quotas(sizes, weights)
    assert sum(taken) == sum(sizes) and min(taken) >= 1
    for count, weight in zip(taken, weights, strict=True):
        exact = sum(sizes) * weight / sum(weights)
        # A share below one pair is raised to one, which others pay for.
        assert abs(count - exact) < 1 + sum(sum(sizes) * w / sum(weights) < 1 for w in weights)


def test_quotas_of_known_weights():
    assert quotas([90, 10], [1, 1]) == [50, 50]
    assert quotas([60, 40], [3, 1]) == [75, 25]
    assert quotas([5, 5, 1], [1, 1, 1]) == [4, 4, 3]
    assert quotas([99, 1], [1000, 1]) == [99, 1]


def epochs(parts: tuple[tuple[int, int], ...], **options) -> Epochs:
    return Epochs(sum(size for size, _ in parts), 7, **{"seed": 3, "parts": parts} | options)


def test_an_epoch_holds_the_quotas_and_every_pair_waits_for_the_others_of_its_source():
    parts = ((10, 24), (20, 6))  # 2.4 times and 0.3 times an epoch
    seen: Counter[int] = Counter()
    for epoch in range(10):
        order = epochs(parts).order(epoch)
        assert len(order) == 30 and ((order < 10).sum(), (order >= 10).sum()) == (24, 6)
        seen.update(order.tolist())
        for source in (range(10), range(10, 30)):
            counts = [seen[i] for i in source]
            assert max(counts) - min(counts) <= 1, (epoch, counts)
    assert all(seen[i] == 24 for i in range(10)) and all(seen[i] == 3 for i in range(10, 30))


def test_an_epoch_is_a_function_of_seed_and_number_alone():
    parts = ((10, 24), (20, 6))
    orders = [epochs(parts).order(e).tolist() for e in range(4)]
    assert [epochs(parts).order(e).tolist() for e in (3, 1)] == [orders[3], orders[1]]
    assert len({tuple(order) for order in orders}) == 4
    assert epochs(parts, seed=4).order(0).tolist() != orders[0]
    steps = epochs(parts)
    assert steps.steps_per_epoch == 5
    assert [i for step in range(5, 10) for i in steps.batch(step)] == orders[1]
    with pytest.raises(ValueError, match="read-only"):
        steps.order(0)[0] = 1


def test_without_shuffling_sources_follow_one_another_and_go_on_where_they_stopped():
    order = epochs(((3, 4), (4, 3)), shuffle=False).order
    assert order(0).tolist() == [0, 1, 2, 0, 3, 4, 5]
    assert order(1).tolist() == [1, 2, 0, 1, 6, 3, 4]


def test_without_weights_an_epoch_is_a_permutation_of_all_pairs():
    plain = Epochs(7, 2, seed=5)
    assert sorted(plain.order(2).tolist()) == list(range(7))
    assert plain.order(2).tolist() == np.random.default_rng((5, 2)).permutation(7).tolist()


def source(folder: Path, name: str, count: int) -> TokenizedPairs:
    rows = [row | {"prompt": f"{name} {row['prompt']}", "margin": i + 1} for i, row in enumerate(plain_rows(count))]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_pairs(folder / name, tokenizer_of("byte"), cache_dir=folder / "c")[0]


def test_a_mixture_is_its_sources_one_behind_the_other(tmp_path):
    parts = [source(tmp_path, "a.jsonl", 4), source(tmp_path, "b.jsonl", 3)]
    mixed = Mixture(parts, ["a.jsonl", "b"])
    assert len(mixed) == 7
    for pair_id in range(7):
        own = parts[pair_id >= 4][pair_id - 4 * (pair_id >= 4)]
        pair = mixed[pair_id]
        assert pair.pair_id == pair_id and pair.margin == own.margin == mixed.margins[pair_id]
        for part in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert getattr(pair, part).tolist() == getattr(own, part).tolist()
        assert [len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)] == mixed.lengths[pair_id].tolist()
    assert mixed.origin(3) == "a.jsonl row 4" and mixed.origin(5) == "b row 2"
    assert str(mixed.texts(5).prompt).startswith("b.jsonl Say 1")
    assert mixed.key != Mixture(parts[::-1], ["b", "a"]).key != parts[0].key
    for out in (-1, 7):
        with pytest.raises(IndexError):
            mixed[out]


def test_the_shares_of_pairs_and_tokens_are_told(tmp_path):
    parts = [source(tmp_path, "a.jsonl", 4), source(tmp_path, "b.jsonl", 2)]
    tokens = [count * part.lengths.sum() / len(part) for part, count in zip(parts, (2, 4), strict=True)]
    lines = share_lines(parts, ["a", "b"], [2, 4])
    assert lines[0] == "mixture: 2 sources, 6 pairs an epoch"
    assert lines[1] == (
        f"  a: 2 pairs an epoch, 33.3% of the pairs, {tokens[0] / sum(tokens):.1%} of the tokens; each of its 4 pairs"
        " 0.50 times"
    )
    assert lines[2].endswith("each of its 2 pairs 2.00 times")
