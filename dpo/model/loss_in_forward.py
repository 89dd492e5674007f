"""The gradient of the loss taken while the logits are there: forward pass of the head over chunks of whole pairs.

    z = logits of h_t;  logp_t = z[target_t] - logsumexp(z);  per-sequence sums -> losses, and g_s = d loss / d sum_s
    dz_t = g_s w_t (onehot(target_t) - softmax(z));           dh_t = W^T dz_t;         dW += dz_t h_t^T

The loss of a pair depends on its own two sums, so that a chunk of whole pairs knows g before its tile of logits is
thrown away. What is kept for backward is dh (N, H) and dW; backward multiplies by the gradient of the total and does
nothing else. No product is computed twice (6HV a row, against 8HV with recomputation) and no logits are kept.

Legend: P pairs, S = 2P sequences, N scored tokens, n rows and p pairs of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dpo.model.logits import PRODUCT, logps_gradient_, product, softmax_of
from dpo.types import LogitMap, PackedBatch

SLICE = 16384
"""Tokens of the vocabulary whose part of dW is computed at a time, so that no second dW stands beside it."""
PairLosses = Callable[[Tensor, Tensor, slice], Tensor]
"""pair_losses(chosen (p,), rejected (p,), pairs) -> (p,) losses of some of the batch's pairs from their log-probs."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole pairs whose rows fill one tile.

    Attributes:
        pairs: Which of the P.
        chosen, rejected: Their rows among the N.
    """

    pairs: slice
    chosen: slice
    rejected: slice


def chunks_of(completion_sizes: tuple[int, ...], chunk_rows: int) -> list[Chunk] | None:
    """Cut a batch into chunks of whole pairs, in order.

    Args:
        completion_sizes: (S,) tokens of every completion, chosen first.
        chunk_rows: Most rows of a chunk.
    Returns:
        The chunks; None where a pair alone has more rows, or there are no pairs.
    """
    num_pairs = len(completion_sizes) // 2
    starts = [0]
    for size in completion_sizes:
        starts.append(starts[-1] + size)
    first_pairs, rows = [0], 0
    for pair in range(num_pairs):
        size = completion_sizes[pair] + completion_sizes[num_pairs + pair]
        if size > chunk_rows:
            return None
        if rows + size > chunk_rows:
            first_pairs.append(pair)
            rows = 0
        rows += size
    if num_pairs == 0:
        return None
    return [
        Chunk(
            slice(first, end),
            slice(starts[first], starts[end]),
            slice(starts[num_pairs + first], starts[num_pairs + end]),
        )
        for first, end in pairwise([*first_pairs, num_pairs])
    ]


def _rows(of_tokens: Tensor, chunk: Chunk) -> Tensor:
    """What a chunk's tokens have, chosen completions first."""
    return torch.cat((of_tokens[chunk.chosen], of_tokens[chunk.rejected]))


def _rescaled(products: Tensor, by: Tensor | None) -> Tensor:
    return products if by is None else products.mul_(by)


class _LossInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: PackedBatch,
        chunks: list[Chunk],
        pair_losses: PairLosses,
        logit_map: LogitMap,
    ) -> tuple[Tensor, Tensor]:
        wants_weight, wants_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(batch.num_sequences, dtype=torch.float64, device=hidden.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if wants_weight else None
        d_bias = torch.zeros(len(weight), dtype=wide, device=hidden.device) if wants_bias else None
        for chunk in chunks:
            h, targets, sequences = (_rows(x, chunk) for x in (hidden, batch.target_ids, batch.sequence_ids))
            weights = None if batch.token_weights is None else _rows(batch.token_weights, chunk)
            softmax = softmax_of(h, weight, bias, logit_map, targets)
            # Of this chunk's sequences alone the others' sums are still, or already, what they are.
            sums.index_add_(0, sequences, (softmax.logps if weights is None else softmax.logps * weights).double())
            losses, g = _gradient(sums.to(wide), chunk, batch.num_sequences // 2, pair_losses)
            total += losses
            per_row = g[sequences] if weights is None else g[sequences] * weights
            # The loss scale comes in backward: in fp16 g * p would be nothing before, so that there the largest g is
            # left out of the tile, with the scale of the logits, and meets the products in fp32.
            largest = None
            if hidden.dtype == torch.float16:
                largest = (per_row.abs().max() * abs(logit_map.scale)).clamp_min(1e-30)
            of_row = (per_row if largest is None else per_row / largest)[:, None]
            dz = logps_gradient_(softmax, targets, of_row, logit_map).to(hidden.dtype)
            del softmax
            rows = _rescaled(product(dz, weight), largest)
            middle = chunk.chosen.stop - chunk.chosen.start
            d_hidden[chunk.chosen], d_hidden[chunk.rejected] = rows[:middle], rows[middle:]
            if d_weight is not None:
                for start in range(0, len(weight), SLICE):
                    tokens = slice(start, start + SLICE)
                    # No name for the product: two slices would be there at a time.
                    d_weight[tokens] += _rescaled(product(dz[:, tokens].T, h), largest)
            if d_bias is not None:
                d_bias += _rescaled(dz.sum(dim=0, dtype=wide), largest)
            del dz  # before the next chunk makes its tile
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        sums = sums.to(wide)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.dtypes
        dtypes = of_hidden, of_weight, of_weight
        saved = zip(ctx.saved_tensors, dtypes, strict=True)
        # In place: a graph is used once, and a second time autograd refuses.
        return *(None if x is None else x.mul_(grad).to(dtype) for x, dtype in saved), None, None, None, None


def _gradient(sums: Tensor, chunk: Chunk, num_pairs: int, pair_losses: PairLosses) -> tuple[Tensor, Tensor]:
    """Summed losses of a chunk, and their gradient by all S sums: zero outside the chunk."""
    with torch.enable_grad():
        chosen, rejected = (x[chunk.pairs].detach().requires_grad_() for x in sums.tensor_split(2))
        losses = pair_losses(chosen, rejected, chunk.pairs).sum()
        of_chosen, of_rejected = torch.autograd.grad(losses, (chosen, rejected), materialize_grads=True)
    g = torch.zeros_like(sums)
    g[chunk.pairs] = of_chosen
    g[num_pairs:][chunk.pairs] = of_rejected
    return losses.detach(), g


def total_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: PackedBatch, chunks: list[Chunk],
    pair_losses: PairLosses, logit_map: LogitMap = PRODUCT,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of a batch's pairs.

    Args:
        hidden: (N, H).
        weight: (V, H) of the output embedding; no gradient of it is computed where it needs none.
        bias: (V,) or None.
        batch: Whose targets, sequences and token weights; 2P sequences.
        chunks: Of `chunks_of`.
        pair_losses: The loss of a pair as a function of its own log-probs, summed over tokens.
        logit_map: What the model does after the product.
    Returns:
        Scalar, differentiable by hidden, weight and bias, and only once; (S,) summed log-probs without gradient. fp32,
        or fp64 for fp64 inputs.
    """  # fmt: skip
    return _LossInForward.apply(hidden, weight, bias, batch, chunks, pair_losses, logit_map)  # type: ignore[return-value]
