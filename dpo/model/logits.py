"""Hidden states -> a tile of logits in fp32, and back.

    z = W h_t + b,    logits = cap tanh(scale z / cap)        (V,)

Most models have neither a scale nor a soft-cap: their logits are the product z. Cohere and Granite scale it, Gemma-2
caps it, and so do others that name it alike; `check.settle` asks every model whether that is all it does.

Legend: n rows of a tile, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from dpo.model.products import HALF, widened
from dpo.types import LogitMap

SLOPE_ROWS = 128
"""Rows of a tile whose slopes are computed at a time, so that there is no second tile of them."""
PRODUCT = LogitMap()


def logit_map_of(config: Any) -> LogitMap:
    """What a model's config says that its head does after the product."""
    text = config.get_text_config()

    def said(name: str) -> float | None:
        value = getattr(text, name, None)
        return float(value) if isinstance(value, int | float) and value else None  # 0 and words: not used as such

    scale = (said("logit_scale") or 1.0) * (said("lm_head_multiplier") or 1.0) / (said("logits_scaling") or 1.0)
    return LogitMap(scale, said("final_logit_softcapping"))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 (fp64 for fp64 inputs), without rounding the sums to 16 bits: on a GPU by the product itself, on a
    CPU, which has no such product, from wider copies."""
    if a.dtype not in HALF:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap = PRODUCT) -> Tensor:
    """A tile of logits of its own memory: (n, V) fp32, or fp64 for fp64 inputs."""
    if hidden.is_cuda and hidden.dtype != torch.float64:
        tile = product(hidden, weight.T)
        tile = tile if bias is None else tile.add_(bias)
    else:
        tile = linear(*widened(hidden, weight, bias))
        tile = tile if tile.dtype == torch.float64 else tile.float()
    scale, cap = logit_map.scale, logit_map.softcap
    if cap is not None:
        return tile.mul_(scale / cap).tanh_().mul_(cap)
    return tile if scale == 1 else tile.mul_(scale)


def _to_product_(grad: Tensor, logits: Tensor | None, logit_map: LogitMap) -> Tensor:
    """The gradient by logits (n, V) made that by their product, in place; `logits`, None where uncapped, are used up.

    d logits / dz = scale (1 - (logits / cap)^2)
    """
    if logits is not None and logit_map.softcap is not None:
        grad.mul_(logits.div_(logit_map.softcap).square_().neg_().add_(1))
    return grad if logit_map.scale == 1 else grad.mul_(logit_map.scale)


def gradients(dz: Tensor, hidden: Tensor, weight: Tensor, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of hidden states, weight and bias, from that of their product (n, V)."""
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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap = PRODUCT) -> Tensor:
        logits = logits_of(hidden, weight, bias, logit_map)
        ctx.logit_map = logit_map
        ctx.save_for_backward(hidden, weight, logits if logit_map.softcap is not None else None)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits = ctx.saved_tensors
        if ctx.logit_map != PRODUCT:
            grad = _to_product_(grad.clone(), None if logits is None else logits.clone(), ctx.logit_map)
        return *gradients(grad, hidden, weight, ctx.needs_input_grad), None


class Softmax(NamedTuple):
    """Softmax of a tile of logits, with what its gradient is computed from.

    Attributes:
        exps: (n, V) exponentials of the logits less their row's largest.
        peak: (n, 1) the largest.
        total: (n, 1) sums of the exponentials.
        of_target: (n, 1) logits of the targets.
    """

    exps: Tensor
    peak: Tensor
    total: Tensor
    of_target: Tensor

    @property
    def logps(self) -> Tensor:
        """(n,) log-probs of the targets."""
        return (self.of_target - self.peak - self.total.log()).squeeze(1)


def softmax_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap, targets: Tensor) -> Softmax:
    """The softmax of a tile, in the memory of its logits."""
    exps = logits_of(hidden, weight, bias, logit_map)
    peak = exps.amax(dim=1, keepdim=True)
    of_target = exps.gather(1, targets[:, None])
    total = exps.sub_(peak).exp_().sum(dim=1, keepdim=True)
    return Softmax(exps, peak, total, of_target)


def logps_gradient_(softmax: Softmax, targets: Tensor, of_row: Tensor, logit_map: LogitMap) -> Tensor:
    """The gradient of sum(of_row logp) by the product (n, V), in the memory of the exponentials.

    d logp_t / d logits = onehot(target_t) - softmax(logits)

    Args:
        softmax: Used up.
        targets: (n,) int64.
        of_row: (n, 1).
        logit_map: Of the model.
    """
    cap = logit_map.softcap
    rows = max(1, len(targets)) if cap is None else SLOPE_ROWS
    parts = zip(*(x.split(rows) for x in (*softmax, targets[:, None], of_row)), strict=True)
    for exps, peak, total, of_target, target, factor in parts:
        logits = None
        if cap is not None:
            # Of a probability that is lost the logit is lost too: harmless, but for the target's.
            logits = exps.clamp_min(torch.finfo(exps.dtype).tiny).log_().add_(peak).scatter_(1, target, of_target)
        exps.mul_(-factor / total).scatter_add_(1, target, factor)  # factor (onehot - softmax)
        _to_product_(exps, logits, logit_map)
    return softmax.exps


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
