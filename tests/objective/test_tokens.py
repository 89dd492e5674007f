"""Token weights known before the forward pass: which tokens count, and that nothing else decides it."""

from __future__ import annotations

import numpy as np
import torch

from dpo.data.batch import collate
from dpo.data.epochs import Epochs
from dpo.data.loader import Loader, whole_pass
from dpo.objective.tokens import length_desensitised, sampled, weigher
from tests import tiny


def test_tokens_beyond_the_shorter_completion_weigh_alpha():
    chosen, rejected = length_desensitised(3, 5, 0.25)
    assert chosen.tolist() == [1, 1, 1] and rejected.tolist() == [1, 1, 1, 0.25, 0.25]
    assert length_desensitised(4, 2, 0.0)[0].tolist() == [1, 1, 0, 0]


def test_as_many_tokens_are_drawn_as_the_shorter_completion_has():
    for pair_id in range(20):
        chosen, rejected = sampled(9, 4, seed=0, step=3, pair_id=pair_id)
        assert chosen.sum() == rejected.sum() == 4 and set(chosen) == {0, 1} and rejected.all()
    assert all(weights.all() for weights in sampled(6, 6, seed=0, step=3, pair_id=1))


def test_the_draw_is_uniform():
    drawn = sum(sampled(8, 2, seed=1, step=step, pair_id=0)[0] for step in range(4000))
    assert np.abs(drawn / 4000 - 0.25).max() < 0.03


def test_the_draw_depends_on_seed_step_and_pair_and_on_nothing_before():
    def draw(*key: int | None) -> list[float]:
        return sampled(30, 5, *key)[0].tolist()

    first = draw(0, 0, 7)
    np.random.seed(5)
    torch.manual_seed(5)
    draw(3, 3, 3)
    assert draw(0, 0, 7) == first
    assert len({tuple(draw(*key)) for key in ((0, 0, 7), (1, 0, 7), (0, 1, 7), (0, 0, 8), (0, None, 7))}) == 5


def test_no_weights_where_every_token_counts():
    assert weigher(False, None, 0) is None


def test_weights_follow_their_tokens_in_every_layout():
    pairs = tiny.pairs(4, longest=6)
    weights = [(np.arange(p.targets[0]) + 10 * i, -np.arange(p.targets[1])) for i, p in enumerate(pairs)]
    expected = np.concatenate([w[0] for w in weights] + [w[1] for w in weights]).tolist()
    for layout in ("shared", "packed", "padded"):
        batch = collate(pairs, layout, weights)
        assert batch.token_weights.tolist() == expected and len(expected) == len(batch.target_ids)
    assert collate(pairs, "shared").token_weights is None


def test_a_pair_keeps_its_weights_however_a_step_is_spread_and_gets_new_ones_at_the_next():
    data = tiny.Pairs(tiny.pairs(6, longest=9))

    def drawn(world_size: int, step: int, micro: int) -> dict[int, list[float]]:
        found = {}
        for rank in range(world_size):
            draw = weigher(True, None, 0)
            loader = Loader(data, Epochs(6, 6, 0), rank, world_size, "shared", 99, micro, token_weights=draw)
            for batch in loader[step].batches:
                for i, pair_id in enumerate(batch.pair_ids):
                    found[pair_id] = batch.token_weights[batch.sequence_ids == i].tolist()
        return found

    assert drawn(1, 0, 6) == drawn(2, 0, 1)
    assert drawn(1, 0, 6) != drawn(1, 1, 6)
    passes = [
        whole_pass(
            Loader(data, Epochs(6, 6, 0), 0, 1, "shared", 999, None, token_weights=weigher(True, None, 0)), range(6)
        )
        for _ in range(2)
    ]
    assert torch.equal(passes[0][0].token_weights, passes[1][0].token_weights)
