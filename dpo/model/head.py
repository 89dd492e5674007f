"""Hidden states of completion tokens -> their log-probs, in fp32, a chunk of rows at a time.

    logp_t = z[target_t] - logsumexp(z),    z = W h_t + b        (V,)

Only rows that predict a completion token come here, so logits of prompt or padding never exist. Up to `chunk_rows` rows
the tile of logits is kept for backward, which is fastest; beyond, every chunk's tile is computed again in backward, so
that memory is one tile however long the completions are.

Legend: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 2048
"""Rows of one logits tile; 2048 x 50257 in fp32 is 0.4 GB. Measured on a CPU, one tile up to 2048 rows is fastest."""


def _logps_of_tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = linear(hidden, weight, bias)  # (n, V)
    return logps_of_logits(logits, targets)


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
        return _logps_of_tile(hidden, weight, bias, targets)
    tiles = [
        checkpoint(_logps_of_tile, h, weight, bias, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    ]
    return torch.cat(tiles)


class Head(nn.Module):
    """Owner of the output embedding while log-probs are computed.

    The parameters are those of the model's own output layer, registered here a second time: under ZeRO-3 a weight is
    whole only within the forward and backward of a module that owns it.
    """

    def __init__(self, output_layer: nn.Module, chunk_rows: int = CHUNK_ROWS) -> None:
        super().__init__()
        self.weight: nn.Parameter = output_layer.weight  # type: ignore[assignment]
        self.bias = getattr(output_layer, "bias", None)
        self.chunk_rows = chunk_rows

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `token_logps`."""
        return token_logps(hidden, self.weight, self.bias, targets, self.chunk_rows)
