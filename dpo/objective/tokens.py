"""Weights of completion tokens that are known before the forward pass, from lengths alone.

Log-probs of policy and reference are summed with the same weights. Nothing here draws from a global random state: the
same pair at the same step has the same weights whatever was done before, and on whichever rank.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dpo.types import TokenizedPair

Weights = tuple[np.ndarray, np.ndarray]
"""Two fp32 arrays: of the scored tokens of chosen and rejected completion."""
Weigher = Callable[[int | None, TokenizedPair], Weights]
"""weigher(step, pair); the step is counted from 0, None outside of training."""


def length_desensitised(chosen: int, rejected: int, alpha: float) -> Weights:
    """LD-DPO: tokens beyond the length of the shorter completion weigh alpha.

    Args:
        chosen, rejected: Scored tokens.
        alpha: In [0, 1]; 1 is DPO.
    Source:
        Liu et al. 2024, arXiv:2409.06411
    """
    shared = min(chosen, rejected)
    weights = []
    for length in (chosen, rejected):
        of_tokens = np.full(length, alpha, dtype=np.float32)
        of_tokens[:shared] = 1
        weights.append(of_tokens)
    return weights[0], weights[1]


def sampled(chosen: int, rejected: int, seed: int, step: int | None, pair_id: int) -> Weights:
    """SamPO: 1 for as many tokens of each completion as the shorter one has, drawn uniformly, 0 for the others.

    Args:
        chosen, rejected: Scored tokens.
        seed, step, pair_id: Decide the draw; step None is a draw of its own, for pairs outside of training.
    Source:
        Lu et al. 2024, arXiv:2406.10957
    """
    rng = np.random.default_rng((seed, 0 if step is None else step + 1, pair_id))
    kept, weights = min(chosen, rejected), []
    for length in (chosen, rejected):
        of_tokens = np.zeros(length, dtype=np.float32)
        of_tokens[rng.permutation(length)[:kept]] = 1
        weights.append(of_tokens)
    return weights[0], weights[1]


def weigher(is_sampo: bool, ld_alpha: float | None, seed: int) -> Weigher | None:
    """What weighs the tokens of a run; None where every token counts alike.

    Args:
        is_sampo: Whether the loss is sampo.
        ld_alpha: loss.ld_alpha.
        seed: train.seed.
    """
    if is_sampo:
        return lambda step, p: sampled(*p.targets, seed, step, p.pair_id)
    if ld_alpha is not None:
        return lambda step, p: length_desensitised(*p.targets, ld_alpha)
    return None
