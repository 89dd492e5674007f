"""Rows of labels -> preferences: ranked lists of completions, and votes between two responses.

    ranked  prompt, completions, scores      the best against the worst, or against each that is rated lower
    votes   prompt, response1, response2,    the response that most votes name; 0 is a vote for a tie
            label (one vote or a list) or annotator1, annotator2, ...

`question`, or `instruction` with its `input`, may stand in place of `prompt` and is a message of the user. A score is
the number in `scores`, or `score`, `overall_score` or minus `rank` of the completion itself; a null in `scores` leaves
a completion out. Equals make no pair: such a row is a tie. The margin of a pair is the difference of the scores, or of
the shares of the votes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from dpo.data.fields import field_of, messages_of, number_of, questions_of, shown, system_of
from dpo.data.formats import convert
from dpo.data.kinds import MISSING, NOT_A_NUMBER, NOT_TEXT, TIE, Problem, Unusable
from dpo.types import PreferenceRow

_TEXTS = ("response", "completion", "content", "text", "answer")
_SCORES = ("score", "overall_score")


def read_row(
    row: Mapping[str, Any], form: str, number: int, ranked_pairs: str = "best_worst"
) -> list[tuple[PreferenceRow | None, list[Problem]]]:
    """Turn one row of a source into its preferences.

    Args:
        row: The row as read.
        form: A format's name, not "auto".
        number: 1-based number of the row in its source.
        ranked_pairs: "best_worst" or "best_each", for ranked rows.
    Returns:
        One entry per pair, as `formats.convert` gives; one entry without a preference for a row that makes none.
    """
    if form not in ("ranked", "votes"):
        return [convert(row, form, number)]
    try:
        pairs = _ranked(row, ranked_pairs == "best_each") if form == "ranked" else _votes(row)
    except Unusable as error:
        return [(None, [error.problem])]
    return [
        (None, [pair]) if isinstance(pair, Problem) else convert({**row, **pair}, _form_of({**row, **pair}), number)
        for pair in pairs
    ]


def _form_of(pair: Mapping[str, Any]) -> str:
    is_text = all(isinstance(pair[part], str) for part in ("prompt", "chosen", "rejected"))
    return "prompt" if is_text and system_of(pair) is None else "conversation"


def _prompt(row: Mapping[str, Any]) -> Any:
    """Read what is answered: text, or messages."""
    if row.get("prompt") is None and (questions := questions_of(row)) is not None:
        return questions
    return field_of(row, "prompt")


def _ranked(row: Mapping[str, Any], each: bool) -> list[dict[str, Any] | Problem]:
    prompt, listed = _prompt(row), field_of(row, "completions")
    if not isinstance(listed, list) or len(listed) < 2:
        raise Unusable(MISSING, f"'completions' must list two or more, got {shown(listed)}")
    scores = row.get("scores")
    if scores is None:
        scores = [_own_score(item, place) for place, item in enumerate(listed, start=1)]
    if not isinstance(scores, list) or len(scores) != len(listed):
        raise Unusable(NOT_A_NUMBER, f"'scores' must hold {len(listed)} numbers, got {shown(scores)}")
    rated = [place for place, score in enumerate(scores) if score is not None]
    if len(rated) < 2:
        raise Unusable(NOT_A_NUMBER, f"'scores' rates {len(rated)} of {len(listed)} completions; a pair needs two")
    numbers = [number_of(scores[place], f"scores[{place}]") for place in rated]
    completions = [_completion(listed[place]) for place in rated]
    best = max(range(len(numbers)), key=lambda i: numbers[i])  # the first of equals
    worst = min(range(len(numbers)), key=lambda i: numbers[i])
    others = [i for i in range(len(numbers)) if i != best] if each else [worst if worst != best else 1]  # all are equal
    return [
        Problem(TIE, f"completions {rated[best] + 1} and {rated[i] + 1} have the score {numbers[best]:g}")
        if numbers[i] == numbers[best]
        else {
            "prompt": prompt,
            "chosen": completions[best],
            "rejected": completions[i],
            "margin": numbers[best] - numbers[i],
        }
        for i in others
    ]


def _own_score(item: Any, place: int) -> float:
    """Read the score that a completion carries; a rank, 1 the best, counts down."""
    for name in _SCORES if isinstance(item, Mapping) else ():
        if item.get(name) is not None:
            return number_of(item[name], name)
    if isinstance(item, Mapping) and item.get("rank") is not None:
        return -number_of(item["rank"], "rank")
    raise Unusable(MISSING, f"there are no 'scores', and completion {place} has no score, overall_score or rank")


def _completion(item: Any) -> Any:
    """Read one completion of a list: text, a message, messages, or a record that holds one of them."""
    if isinstance(item, Mapping) and "role" not in item:
        for name in _TEXTS:
            if item.get(name) is not None:
                return _completion(item[name])
    if isinstance(item, str):
        return item
    if not isinstance(item, (list, Mapping)):
        raise Unusable(NOT_TEXT, f"a completion is {shown(item)}")
    return messages_of({"completions": item}, "completions")


def _votes(row: Mapping[str, Any]) -> list[dict[str, Any] | Problem]:
    prompt = _prompt(row)
    given = row.get("label")
    if given is None:
        given = [row[name] for name in sorted(row) if re.fullmatch(r"annotator\d+", name)]
    votes = [vote for vote in (given if isinstance(given, list) else [given]) if vote is not None]
    if not votes:
        raise Unusable(MISSING, f"there is neither 'label' nor 'annotator1'; the row has {', '.join(map(str, row))}")
    if wrong := [vote for vote in votes if isinstance(vote, bool) or vote not in (0, 1, 2)]:
        raise Unusable(NOT_A_NUMBER, f"a vote must be 0 (tie), 1 or 2, got {shown(wrong[0])}")
    responses = {1: field_of(row, "response1"), 2: field_of(row, "response2")}
    counts = Counter(votes).most_common()
    winner = counts[0][0]
    if winner == 0 or any(a[1] == b[1] == counts[0][1] for a, b in pairwise(counts)):
        return [Problem(TIE, f"votes {', '.join(map(str, votes))}")]
    for column, response in responses.items():
        if not isinstance(response, (str, list, Mapping)):
            raise Unusable(NOT_TEXT, f"'response{column}' is of type {type(response).__name__}")
    margin = (votes.count(winner) - votes.count(3 - winner)) / len(votes)
    return [{"prompt": prompt, "chosen": responses[winner], "rejected": responses[3 - winner], "margin": margin}]
