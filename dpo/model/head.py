"""Hidden states of completion tokens -> their log-probs, in fp32, a chunk of rows at a time.

    logp_t = z[target_t] - logsumexp(z),    z = W h_t + b        (V,)

Only rows that predict a completion token come here, so logits of prompt or padding never exist. Up to `chunk_rows` rows
the tile of logits is kept for backward, which is fastest; beyond, every chunk's tile is computed again in backward, so
that memory is one tile however long the completions are.

Legend: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from dpo.model.products import HALF, widened

CHUNK_ROWS = 2048
"""Rows of one logits tile; 2048 x 50257 in fp32 is 0.4 GB. Measured on a CPU, one tile up to 2048 rows is fastest."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (fp64 for fp64 inputs), without rounding the sums to 16 bits: on a GPU by the product itself, on a
    CPU, which has no such product, from wider copies."""
    if a.dtype not in HALF:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A tile of logits of its own memory: (n, V) fp32, or fp64 for fp64 inputs."""
    if hidden.is_cuda and hidden.dtype != torch.float64:
        tile = product(hidden, weight.T)
        return tile if bias is None else tile.add_(bias)
    logits = linear(*widened(hidden, weight, bias))
    return logits if logits.dtype == torch.float64 else logits.float()


def padded_vocabulary(weight: Tensor, bias: Tensor | None, multiple: int) -> tuple[Tensor, Tensor | None]:
    """Output embedding with rows added up to a multiple, so that rows of a 16-bit tile are aligned for tensor cores.

    Returns:
        (V', H) and (V',): the bias of an added row is -inf, its probability 0. Unchanged where V is a multiple.
    """
    missing = -len(weight) % multiple
    if missing == 0:
        return weight, bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return pad(weight, (0, 0, 0, missing)), pad(bias, (0, missing), value=-math.inf)


class _TileLogps(torch.autograd.Function):
    """Log-probs of one tile, with the softmax of the forward pass kept for backward and no other (n, V) tensor.

    d logp_t / dz = onehot(target_t) - softmax(z). Autograd over `logps_of_logits` makes four more passes over the tile;
    measured on 2 CPU cores, 1,100 rows x 50,257 in bf16, forward and backward together take two thirds of its time.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        exps = logits_of(hidden, weight, bias)  # (n, V)
        peak = exps.amax(dim=1, keepdim=True)
        of_target = exps.gather(1, targets[:, None])
        exps.sub_(peak).exp_()
        total = exps.sum(dim=1, keepdim=True)
        ctx.save_for_backward(hidden, weight, bias, targets, exps, total)
        return (of_target - peak - total.log()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, exps, total = ctx.saved_tensors
        dz = exps.mul_(-grad[:, None] / total)  # in place: a graph is used once, and a second time autograd refuses
        dz.scatter_add_(1, targets[:, None], grad[:, None])
        return *_gradients(dz, hidden, weight, ctx.needs_input_grad), None


def _gradients(dz: Tensor, hidden: Tensor, weight: Tensor, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of hidden states, weight and bias, from that of their logits (n, V)."""
    rows, output = widened(hidden, weight)
    dz = dz.to(rows.dtype)
    d_hidden = (dz @ output).to(hidden.dtype) if wants[0] else None
    del output  # a copy as large as the gradient that follows
    return (
        d_hidden,
        (dz.T @ rows).to(weight.dtype) if wants[1] else None,
        dz.sum(dim=0).to(weight.dtype) if wants[2] else None,
    )


class Logits(torch.autograd.Function):
    """`logits_of`, for what is done with a tile beside its targets' log-probs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return logits_of(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return _gradients(grad, hidden, weight, ctx.needs_input_grad)


def logps_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of target tokens from logits.

    Args:
        logits: (n, V), any float dtype.
        targets: (n,) int64.
    Returns:
        (n,) fp32, or fp64 for fp64 logits; nats.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def token_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Log-probs of target tokens from the hidden states that predict them.

    Args:
        hidden: (N, H).
        weight: (V, H) of the output embedding.
        bias: (V,) or None.
        targets: (N,) int64.
        chunk_rows: Rows per logits tile.
    Returns:
        (N,) fp32 (fp64 for fp64 inputs), nats; N = 0 gives an empty tensor that still depends on hidden and weight.
    """
    if hidden.shape[0] <= chunk_rows:
        return _TileLogps.apply(hidden, weight, bias, targets) if len(hidden) else _logps_of_nothing(hidden, weight)
    tiles = [
        checkpoint(_TileLogps.apply, h, weight, bias, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    ]
    return torch.cat(tiles)


def _logps_of_nothing(hidden: Tensor, weight: Tensor) -> Tensor:
    """(0,): no log-probs, yet a function of hidden and weight, so that an empty micro-batch reaches both."""
    nothing = (hidden @ weight.T[:, :1]).squeeze(1)
    return nothing.to(torch.promote_types(hidden.dtype, torch.float32))


class Head(nn.Module):
    """Owner of the output embedding while log-probs are computed.

    The parameters are those of the model's own output layer, registered here a second time: under ZeRO-3 a weight is
    whole only within the forward and backward of a module that owns it.

    Attributes:
        chunk_rows: Rows per logits tile.
        multiple: Of which the computed vocabulary is one; see `padded_vocabulary`.
    """

    def __init__(self, output_layer: nn.Module, chunk_rows: int = CHUNK_ROWS) -> None:
        super().__init__()
        self.weight: nn.Parameter = output_layer.weight  # type: ignore[assignment]
        self.bias = getattr(output_layer, "bias", None)
        self.chunk_rows = chunk_rows
        self.multiple = 1

    def forward(self, hidden: Tensor, targets: Tensor, instead: Callable[..., Any] | None = None) -> Any:
        """See `token_logps`; or whatever `instead` makes of hidden states, weight and bias while they are whole."""
        weight, bias = padded_vocabulary(self.weight, self.bias, self.multiple)
        if instead is not None:
            return instead(hidden, weight, bias)
        return token_logps(hidden, weight, bias, targets, self.chunk_rows)
