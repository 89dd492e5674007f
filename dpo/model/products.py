"""Products of 16-bit matrices on a CPU that multiplies fp32 matrices faster.

    y = round(float(x) float(W)^T + float(b))

A copy in fp32 is exact and the result is rounded once, as in a 16-bit kernel that adds up in fp32. What is kept for
backward stays in 16 bits. Measured: docs/performance.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

HALF = (torch.float16, torch.bfloat16)
FEW_ROWS = 16
"""Fewer are left in 16 bits, as when an answer is written token by token: copying the weight would take longest."""


@cache
def fp32_is_faster() -> bool:
    """Whether this CPU multiplies bf16 faster by way of fp32: an x86 CPU without AMX and without AMD's AVX512-BF16.

    By the CPU's features and not by a measurement, so that a run that goes on computes what it computed before.
    """
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if has.get("architecture") != "x86_64" or has.get("amx_bf16", True):
        return False
    return not has.get("avx512_bf16", True) or str(has.get("cpu_name")).startswith("Intel")


def multiplies_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of operands of this dtype on this device are computed in fp32."""
    return dtype in HALF and device.type == "cpu" and fp32_is_faster()


def widened(*operands: Tensor | None) -> list[Any]:
    """The operands of a product, copied to fp32 if it is to be computed there."""
    if not all(t is None or multiplies_in_fp32(t.dtype, t.device) for t in operands):
        return list(operands)
    return [None if t is None else t.float() for t in operands]


class _Product(torch.autograd.Function):
    """x W^T + b with products in fp32; `weight` is (out, in), or (in, out) where `is_transposed`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        # The weight itself, not its copy: under ZeRO-3 it is whole again in backward.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.is_transposed = is_transposed
        wide = weight.float()
        return linear(x.float(), wide.T if is_transposed else wide, None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        wide = grad.float()
        d_x = d_weight = d_bias = None
        if wants_x:
            d_x = linear(wide, weight.float() if ctx.is_transposed else weight.float().T).to(grad.dtype)
        rows = wide.reshape(-1, wide.shape[-1])
        if wants_weight:
            inputs = x.float().reshape(-1, x.shape[-1])
            d_weight = (inputs.T @ rows if ctx.is_transposed else rows.T @ inputs).to(weight.dtype)
        if wants_bias:
            d_bias = rows.sum(dim=0).to(weight.dtype)
        return d_x, d_weight, d_bias, None


def _is_worth_a_copy(x: Tensor) -> bool:
    return x.dtype in HALF and x.numel() >= FEW_ROWS * x.shape[-1]


class WideLinear(nn.Linear):
    """A linear layer that multiplies 16-bit numbers in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not _is_worth_a_copy(input):
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias, False)


class WideConv1D(Conv1D):
    """GPT-2's linear layer, which multiplies 16-bit numbers in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _Product.apply(x, self.weight, self.bias, True) if _is_worth_a_copy(x) else super().forward(x)


def widen(model: nn.Module) -> None:
    """Make the linear layers of a model on a CPU multiply in fp32, if that is faster; a copy of it does likewise."""
    if not fp32_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear
        elif type(module) is Conv1D:
            module.__class__ = WideConv1D
