"""The planner loads ranks evenly, as evenly as whole pairs allow; benchmarks/balance.py measures that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import balance
from benchmarks.report import write_block
from dpo.data.planner import EVEN_ENOUGH, Costs, _exchange, num_tokens, plan_batch
from dpo.estimate import costs_beside_tokens, imbalance, micro_batch_tokens, waiting

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- balance: begin -->", "<!-- balance: end -->"


def skewed(count: int, seed: int = 0) -> np.ndarray:
    """Lengths with the mean and the tail of HH-RLHF at 1,024 tokens."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.lognormal(mean, 0.9, count).clip(2, cut) for mean, cut in
                     ((4.7, 512), (3.9, 512), (3.9, 512))], axis=1).astype(np.int64)  # fmt: skip


def test_imbalance_is_the_costliest_rank_over_the_mean() -> None:
    tokens = np.array([[4, 0], [1, 3], [2, 2]])
    assert imbalance(tokens) == 1
    assert waiting(tokens) == (4 + 3) / 4
    assert imbalance(np.array([[6], [2]])) == 1.5


def test_micro_batches_are_measured_as_they_are_laid_out() -> None:
    lengths = np.array([[3, 5, 2], [1, 1, 1]])
    assert micro_batch_tokens([[[0, 1], []]], lengths, "shared").tolist() == [[13, 0]]
    assert micro_batch_tokens([[[0, 1], [1]]], lengths, "padded").tolist() == [[32, 4]]


def test_what_micro_batches_cost_beside_their_tokens_by_hand() -> None:
    lengths, costs = np.array([[3, 5, 2], [1, 1, 1]]), Costs(completion=500_000, product=10_000)
    # logits of 7 and 2 completion tokens; products 36 + 15 - 6 and 3 + 3 - 1
    assert costs_beside_tokens([[[0, 1], []]], lengths, "shared", costs).tolist() == [[4.5 + 0.5, 0]]
    assert costs_beside_tokens([[[0]], [[1]]], lengths, "packed", costs).tolist() == [[3.5 + 0.51], [1.0 + 0.06]]
    assert costs_beside_tokens([[[0], [1]]], lengths, "chosen", costs).tolist() == [[2.5 + 0.36, 0.5 + 0.03]]


def test_ranks_are_even_in_what_a_model_computes_and_not_in_tokens_alone() -> None:
    """Two kinds of pairs with as many tokens: long prompts, and long completions, which cost more."""
    lengths = np.array([[1000, 50, 50], [100, 500, 500]] * 32)
    plan = plan_batch(range(64), lengths, world_size=8, token_budget=4096, layout="shared", costs=balance.GPT2)
    kinds = [sorted(i % 2 for ids in rank for i in ids) for rank in plan]
    assert kinds == [[0] * 4 + [1] * 4] * 8
    row = balance.measure(skewed(4000), 8, 256, draws=5)
    assert row.by_tokens.mean() > 1.015 and row.planned.max() < 1.0015


@settings(deadline=None, max_examples=100)
@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60), ranks=st.integers(1, 9))
def test_exchanging_loses_no_pair_and_never_makes_it_worse(costs: list[int], ranks: int) -> None:
    shares: list[list[int]] = [list(range(rank, len(costs), ranks)) for rank in range(ranks)]
    before = max(sum(costs[i] for i in share) for share in shares)
    _exchange(shares, costs)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert max(sum(costs[i] for i in share) for share in shares) <= before


def test_exchanges_even_out_what_lpt_leaves() -> None:
    # LPT gives 8 + 5 + 4 and 7 + 6: the swap of 8 for 6 and so on makes both 15.
    shares = [[0, 3, 4], [1, 2]]
    costs = [8, 7, 6, 5, 4]
    _exchange(shares, costs)
    assert [sum(costs[i] for i in share) for share in shares] == [15, 15]


@pytest.mark.parametrize(("ranks", "pairs", "most"), [(8, 64, 1.005), (8, 256, 1.0015), (64, 512, 1.01)])
def test_the_planner_is_far_better_than_chance(ranks: int, pairs: int, most: float) -> None:
    row = balance.measure(skewed(4000), ranks, pairs, draws=5)
    assert row.planned.max() <= most
    assert row.random.mean() > 1.1 and (row.planned >= row.bound - 1e-12).all()


def test_with_four_pairs_a_rank_the_longest_pair_is_the_bound_and_is_reached() -> None:
    lengths = skewed(4096)
    lengths[7] = (900, 500, 500)
    row = balance.measure(lengths, 1024, 4096, draws=1)
    assert row.bound[0] > 1.05
    assert row.planned[0] == pytest.approx(row.bound[0])


def test_ranks_that_wait_after_every_micro_batch_wait_little() -> None:
    lengths = skewed(2048)
    plan = plan_batch(range(2048), lengths, world_size=64, token_budget=4096, layout="shared")
    tokens = micro_batch_tokens(plan, lengths, "shared")
    assert tokens.shape[1] > 1 and waiting(tokens) < 1.02


def test_the_targets_on_real_lengths(shared_data: Path, tmp_path: Path) -> None:
    from dpo.model.load import load_tokenizer
    from tests.by_path import prepare_pairs

    tokenizer = load_tokenizer(str(shared_data / "gpt2-tokenizer"))
    pairs, _ = prepare_pairs(
        shared_data / "hh-rlhf" / "train.jsonl.gz", tokenizer, max_length=1024, max_prompt_length=512,
        on_bad_row="skip", cache_dir=tmp_path,
    )  # fmt: skip
    lengths = np.asarray(pairs.lengths)
    assert balance.measure(lengths, 8, 256, draws=10).planned.max() <= 1.01
    large = balance.measure(lengths, 1024, 4096, draws=2)
    # 1.05 is out of reach here: the costliest pair alone is 1.4 times the mean rank.
    assert large.bound.min() > 1.35 and large.planned == pytest.approx(large.bound)
    short = lengths[num_tokens(lengths, "shared") < 1000]
    assert balance.measure(short, 1024, 4096, draws=2).planned.max() <= 1.05
    assert balance.measure(short, 1024, 8192, draws=1).planned.max() <= 1.02


def test_the_table_goes_between_the_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_block(page, "balance", "| new |")
    assert page.read_text() == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"


def test_the_page_shows_what_the_targets_ask_for() -> None:
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    table = text.split(BEGIN)[1].split(END)[0]
    for ranks in balance.RANKS:
        assert table.count(f"\n| {ranks:,} | ") == 2 * len(balance.PAIRS_PER_RANK)


def test_a_page_without_markers_or_data_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(tmp_path / "none.jsonl"), "--tokenizer", "builtin:tiny", "--cache_dir", str(tmp_path)]
    assert balance.main(argv) == 2
    assert capsys.readouterr().err.startswith("benchmarks/balance.py: ")
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(balance.UserError, match="must hold <!-- balance: begin -->"):
        write_block(tmp_path / "page.md", "balance", "")
    assert EVEN_ENOUGH > 1
