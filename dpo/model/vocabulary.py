"""Whole next-token distributions, a tile of rows at a time: what a few losses need beside the target's log-prob.

Full logits of all completion tokens never exist: a tile of `chunk_rows` rows is computed, reduced to one number a row
and thrown away; where there is a gradient it is computed again in backward.

Legend: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpo.model.head import token_logps
from dpo.model.logits import PRODUCT, Logits, logits_of
from dpo.types import FrozenTokens, LogitMap


def _tile_kls(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap, frozen: FrozenTokens
) -> Tensor:
    policy = Logits.apply(hidden, weight, bias, logit_map).log_softmax(dim=1)  # (n, V)
    reference = logits_of(frozen.hidden, frozen.weight, frozen.bias, frozen.logit_map).log_softmax(dim=1)
    return (reference.exp() * (reference - policy)).sum(dim=1)


def token_kls(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    frozen: FrozenTokens,
    chunk_rows: int,
    logit_map: LogitMap = PRODUCT,
) -> Tensor:
    """KL(reference || policy) of the next-token distribution at every scored token.

    Args:
        hidden: (N, H) of the policy, with gradient.
        weight, bias: Of the policy's output embedding.
        frozen: The reference at the same tokens.
        chunk_rows: Rows per tile.
        logit_map: What the policy does after the product.
    Returns:
        (N,) fp32 (fp64 for fp64 inputs), nats, >= 0.
    """
    tiles = [
        checkpoint(_tile_kls, h, weight, bias, logit_map, replace(frozen, hidden=f), use_reentrant=False)
        for h, f in zip(hidden.split(chunk_rows), frozen.hidden.split(chunk_rows), strict=True)
        if len(h)
    ]
    return torch.cat(tiles) if tiles else Logits.apply(hidden, weight[:1], None).squeeze(1)


@torch.no_grad()
def certainties(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, logit_map: LogitMap = PRODUCT
) -> Tensor:
    """How certain a model is of every token: log sum_v p(v)^2, what the target's log-prob is measured against.

    Args:
        hidden: (N, H).
        weight, bias: Of the output embedding.
        chunk_rows: Rows per tile.
        logit_map: What the model does after the product.
    Returns:
        (N,) fp32 (fp64 for fp64 inputs), in [-log V, 0], without gradient.

    Source: the aligned weights of WPO, Zhou et al. 2024, arXiv:2406.11827, Eq. 2.
    """
    tiles = []
    for h in hidden.split(chunk_rows):
        logits = logits_of(h, weight, bias, logit_map)  # (n, V)
        tiles.append((2 * logits).logsumexp(dim=1) - 2 * logits.logsumexp(dim=1))
    return torch.cat(tiles)


def logps_and_certainties(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, targets: Tensor, chunk_rows: int, logit_map: LogitMap
) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens, and certainties, which have no gradient; arguments as of both. (N,) each."""
    logps = token_logps(hidden, weight, bias, targets, chunk_rows, logit_map)
    return logps, certainties(hidden, weight, bias, chunk_rows, logit_map)
