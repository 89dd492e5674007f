"""What trivial rules make of preference pairs: the baseline that a reward accuracy must beat.

    longer_characters, longer_tokens   the longer completion is the chosen one
    overlap                            the one of whose distinct tokens a larger share stands in the prompt
    first_token                        the one that begins with a token that was chosen more often in the training pairs

A rule that cannot decide counts one half. First tokens are learned from training pairs alone and applied to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dpo.data.store import TokenizedPairs

MOST_PAIRS = 20_000
"""Pairs of a set that `overlap` and `first_token` look at, evenly spaced where there are more."""


def accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Share of pairs whose chosen side has the greater score; equals count one half.

    Args:
        chosen, rejected: (n,) scores of a rule.
    """
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def looked_at(pairs: TokenizedPairs) -> list[int]:
    """Ids of at most MOST_PAIRS pairs, evenly spaced."""
    return np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_PAIRS)).astype(np.int64)).tolist()


def longer(pairs: TokenizedPairs) -> dict[str, float]:
    """Accuracy of "the longer completion is the chosen one", in characters before truncation and in tokens after it."""
    return {
        "longer_characters": accuracy(pairs.characters[:, 0], pairs.characters[:, 1]),
        "longer_tokens": accuracy(pairs.lengths[:, 1], pairs.lengths[:, 2]),
    }


def overlap(pairs: TokenizedPairs) -> float:
    """Accuracy of "the completion that shares more with its prompt is the chosen one".

    The score of a completion is the share of its distinct tokens that stand in the prompt; its last token, which ends
    it, is left out.
    """
    scores = []
    for pair_id in looked_at(pairs):
        pair = pairs[pair_id]
        prompt = set(pair.prompt_ids.tolist())
        sides = [set(ids[:-1].tolist()) for ids in (pair.chosen_ids, pair.rejected_ids)]
        scores.append([len(side & prompt) / len(side) if side else 0.0 for side in sides])
    table = np.array(scores)
    return accuracy(table[:, 0], table[:, 1])


def first_token_rates(sets: Sequence[TokenizedPairs]) -> dict[int, float]:
    """Learn how often a completion that begins with a token is the chosen one.

    Args:
        sets: Training pairs.
    Returns:
        Token id -> (times chosen + 1) / (times seen + 2), in (0, 1); a token never seen would have one half.
    """
    chosen: Counter[int] = Counter()
    seen: Counter[int] = Counter()
    for pairs in sets:
        for pair_id in looked_at(pairs):
            pair = pairs[pair_id]
            first, other = int(pair.chosen_ids[0]), int(pair.rejected_ids[0])
            chosen[first] += 1
            seen.update((first, other))
    return {token: (chosen[token] + 1) / (count + 2) for token, count in seen.items()}


def first_token(pairs: TokenizedPairs, rates: dict[int, float]) -> float:
    """Accuracy of "the completion whose first token has the higher rate is the chosen one".

    Args:
        pairs: Not those that the rates were learned from.
        rates: Of `first_token_rates`.
    """
    firsts = [(pairs[i].chosen_ids[0], pairs[i].rejected_ids[0]) for i in looked_at(pairs)]
    table = np.array([[rates.get(int(token), 0.5) for token in both] for both in firsts])
    return accuracy(table[:, 0], table[:, 1])
