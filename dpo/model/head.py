"""Hidden states of completion tokens -> their log-probs, in fp32, a chunk of rows at a time.

    logp_t = z[target_t] - logsumexp(z),    z the logits of h_t        (V,)

Only rows that predict a completion token come here, so logits of prompt or padding never exist. Up to `chunk_rows` rows
the tile of logits is kept for backward, which is fastest; beyond, every chunk's tile is computed again in backward, so
that memory is one tile however long the completions are.

Legend: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo.model.logits import PRODUCT, Softmax, gradients, logps_gradient_, padded_vocabulary, softmax_of
from dpo.types import LogitMap

CHUNK_ROWS = 2048
"""Rows of one logits tile; 2048 x 50257 in fp32 is 0.4 GB. Measured on a CPU, one tile up to 2048 rows is fastest."""


class _TileLogps(torch.autograd.Function):
    """Log-probs of one tile, with the softmax of the forward pass kept for backward and no other (n, V) tensor.

    Autograd over `logps_of_logits` makes four more passes over the tile; measured on 2 CPU cores, 1,100 rows x 50,257
    in bf16, forward and backward together take two thirds of its time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap, targets: Tensor
    ) -> Tensor:
        softmax = softmax_of(hidden, weight, bias, logit_map, targets)
        ctx.save_for_backward(hidden, weight, targets, *softmax)
        ctx.logit_map = logit_map
        return softmax.logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *softmax = ctx.saved_tensors
        # In place: a graph is used once, and a second time autograd refuses.
        dz = logps_gradient_(Softmax(*softmax), targets, grad[:, None], ctx.logit_map)
        return *gradients(dz, hidden, weight, ctx.needs_input_grad), None, None


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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_rows: int = CHUNK_ROWS,
    logit_map: LogitMap = PRODUCT,
) -> Tensor:
    """Log-probs of target tokens from the hidden states that predict them.

    Args:
        hidden: (N, H).
        weight: (V, H) of the output embedding.
        bias: (V,) or None.
        targets: (N,) int64.
        chunk_rows: Rows per logits tile.
        logit_map: What the model does after the product.
    Returns:
        (N,) fp32 (fp64 for fp64 inputs), nats; N = 0 gives an empty tensor that still depends on the inputs.
    """
    if hidden.shape[0] <= chunk_rows:
        if len(hidden) == 0:
            return _logps_of_nothing(hidden, weight, bias)
        return _TileLogps.apply(hidden, weight, bias, logit_map, targets)
    tiles = [
        checkpoint(_TileLogps.apply, h, weight, bias, logit_map, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    ]
    return torch.cat(tiles)


def _logps_of_nothing(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(0,): no log-probs, yet a function of hidden, weight and bias, so that an empty micro-batch reaches them all."""
    nothing = (hidden @ weight.T[:, :1]).squeeze(1)
    if bias is not None:
        nothing = nothing + bias[:0]
    return nothing.to(torch.promote_types(hidden.dtype, torch.float32))


class Head(nn.Module):
    """Owner of the output embedding while log-probs are computed.

    The parameters are those of the model's own output layer, registered here a second time: under ZeRO-3 a weight is
    whole only within the forward and backward of a module that owns it.

    Attributes:
        chunk_rows: Rows per logits tile.
        logit_map: What the model does after the product.
        multiple: Of which the computed vocabulary is one; see `padded_vocabulary`. Without effect under a soft-cap.
    """

    def __init__(self, output_layer: nn.Module, chunk_rows: int = CHUNK_ROWS, logit_map: LogitMap = PRODUCT) -> None:
        super().__init__()
        self.logit_map = logit_map
        self.weight: nn.Parameter = output_layer.weight  # type: ignore[assignment]
        self.bias = getattr(output_layer, "bias", None)
        self.chunk_rows = chunk_rows
        self.multiple = 1

    def forward(self, hidden: Tensor, targets: Tensor, instead: Callable[..., Any] | None = None) -> Any:
        """See `token_logps`; or whatever `instead` makes of hidden states, weight and bias while they are whole."""
        # The -inf of an added row would be capped.
        multiple = self.multiple if self.logit_map.softcap is None else 1
        weight, bias = padded_vocabulary(self.weight, self.bias, multiple)
        if instead is not None:
            return instead(hidden, weight, bias)
        return token_logps(hidden, weight, bias, targets, self.chunk_rows, self.logit_map)
