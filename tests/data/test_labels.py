"""Labels: ranked lists and votes become pairs by the stated rules; equals make none."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo.data.formats import detect_format
from dpo.data.labels import read_row

USER = {"role": "user", "content": "Hi"}


def made(row: dict[str, Any], form: str = "ranked", how: str = "best_worst") -> list[Any]:
    """(chosen, rejected, margin) of every pair, or the kind of what was found instead."""
    return [
        (pair.chosen, pair.rejected, pair.margin) if pair else problems[0].kind
        for pair, problems in read_row(row, form, 1, how)
    ]


RANKED = {"prompt": "Hi", "completions": [" b", " d", " a", " c"], "scores": [3, 1, 4, 1.5]}


def test_the_best_stands_against_the_worst_or_against_each_lower_one() -> None:
    assert detect_format([RANKED]) == "ranked"
    assert made(RANKED) == [(" a", " d", 3.0)]
    assert made(RANKED, how="best_each") == [(" a", " b", 1.0), (" a", " d", 3.0), (" a", " c", 2.5)]


def test_equals_make_no_pair() -> None:
    row = RANKED | {"scores": [4, 1, 4, 1]}
    assert made(row) == [(" b", " d", 3.0)]  # the first of the best, the first of the worst
    assert made(row, how="best_each") == [(" b", " d", 3.0), "tie", (" b", " c", 3.0)]
    assert made(RANKED | {"scores": [2, 2, 2, 2]}) == ["tie"]


@pytest.mark.parametrize(
    "completions",
    [
        [{"response": "x", "overall_score": 2}, {"response": "y", "overall_score": 5}],
        [{"text": "x", "score": -3}, {"text": "y", "score": 0}],
        [{"completion": "x", "rank": 4}, {"completion": "y", "rank": 1}],
    ],
)
def test_scores_may_stand_with_their_completions_and_ranks_count_down(completions: list[Any]) -> None:
    assert made({"prompt": "Hi", "completions": completions}) == [("y", "x", 3.0)]


def test_an_instruction_is_a_message_and_so_are_its_answers() -> None:
    answers = [{"response": "3"}, {"response": "4"}]
    row = {"instruction": "Add.", "input": "1 2", "completions": answers, "scores": [1, 0]}
    ((pair, problems),) = read_row(row, "ranked", 7)
    assert pair is not None and not problems and pair.row == 7
    assert pair.prompt == [{"role": "user", "content": "Add.\n\n1 2"}]
    assert pair.chosen == [{"role": "assistant", "content": "3"}]
    listed = {"prompt": [USER], "completions": [[{"role": "assistant", "content": c}] for c in "ab"], "scores": [0, 1]}
    ((pair, _),) = read_row(listed, "ranked", 1)
    assert pair is not None and pair.prompt == [USER] and pair.chosen == [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("ranked_pairs", ["best_worst", "best_each"])
def test_a_completion_without_a_score_is_left_out(ranked_pairs: str) -> None:
    row = {"prompt": "Q:", "completions": [" a", " b", " c", " d"], "scores": [2, None, 5, 1]}
    chosen = [(pair.chosen, pair.rejected, pair.margin) for pair, _ in read_row(row, "ranked", 1, ranked_pairs) if pair]
    assert chosen == [(" c", " a", 3.0), (" c", " d", 4.0)][ranked_pairs == "best_worst" :]
    ((_, problems),) = read_row(row | {"scores": [None, 3, None, 3]}, "ranked", 1)
    assert problems[0].kind == "tie" and problems[0].detail == "completions 2 and 4 have the score 3"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"scores": [1, 2]}, "not a number"),
        ({"scores": [1, None, None, None]}, "not a number"),
        ({"scores": [1, 2, 3, "4"]}, "not a number"),
        ({"scores": None}, "missing field"),
        ({"completions": ["a"], "scores": [1]}, "missing field"),
        ({"completions": None}, "missing field"),
        ({"completions": [" a", " b", 3, " c"]}, "not a string"),
        ({"prompt": None}, "missing field"),
        ({"prompt": None, "instruction": True}, "not a string"),
        ({"completions": [" a"] * 4}, "chosen == rejected"),
    ],
)
def test_a_list_that_is_not_whole_is_a_bad_row(change: dict[str, Any], kind: str) -> None:
    ((_, problems),) = read_row(RANKED | change, "ranked", 1)
    assert [problem.kind for problem in problems] == [kind] and problems[0].detail


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([1, 1, 2], [("x", "y", pytest.approx(1 / 3))]), ([2, 2, 2], [("y", "x", 1.0)]), (2, [("y", "x", 1.0)]),
        ([0, 0, 1], ["tie"]), ([0, 1, 2], ["tie"]), ([1, 2], ["tie"]), (0, ["tie"]),
        ([2, 0, 2], [("y", "x", pytest.approx(2 / 3))]), ([1, None, 1], [("x", "y", 1.0)]), ([None], ["missing field"]),
        ([1, 3], ["not a number"]), ([True], ["not a number"]), ([], ["missing field"]),
    ],
)  # fmt: skip
def test_the_side_with_most_votes_is_chosen(votes: Any, expected: list[Any]) -> None:
    row = {"prompt": "Hi", "response1": "x", "response2": "y", "label": votes}
    assert detect_format([row]) == "votes" and made(row, "votes") == expected
    if isinstance(votes, list):
        named = {f"annotator{i}": vote for i, vote in enumerate(votes, start=1)}
        assert made({"prompt": "Hi", "response1": "x", "response2": "y", **named}, "votes") == expected


def test_real_votes_are_counted_as_their_authors_count_them(shared_data: Path) -> None:
    rows = json.loads(gzip.decompress((shared_data / "pandalm-testset/testset-v1.json.gz").read_bytes()))
    assert detect_format(rows[:100]) == "votes"
    odd: dict[str, list[int]] = {}
    chosen: Counter[int] = Counter()
    for row in rows:
        ((pair, problems),) = read_row(row, "votes", 1)
        for problem in problems:
            odd.setdefault(problem.kind, []).append(row["idx"])
        if pair:
            chosen[1 if pair.chosen[0]["content"] == row["response1"] else 2] += 1  # type: ignore[index]
    assert len(odd["tie"]) == 105 and odd["not a string"] == [157, 158, 159, 161, 162, 164]
    assert chosen[1] + chosen[2] == 999 - 105 - 6 and chosen[1] == 422 - 4 and chosen[2] == 472 - 2


def test_a_column_system_makes_a_conversation_of_a_ranked_row() -> None:
    ((pair, problems),) = read_row(RANKED | {"system": "Be brief"}, "ranked", 1)
    assert pair and not problems and pair.prompt == [{"role": "system", "content": "Be brief"}, USER]
    assert pair.chosen == [{"role": "assistant", "content": " a"}]
