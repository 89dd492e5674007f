"""Attention over segments in one call: a gather of keys and values, then a variable-length flash kernel.

A segment's queries stand side by side in the row already; its keys, prefix first, are gathered by `kv_index`. The
kernel's causal mask is aligned to the bottom right, so that the last query sees all keys: exact for the rejected
completion, whose keys are [prompt | completion]. No mask is made, no product is computed twice.

Kernels: PyTorch's own (torch.nn.attention.varlen), flash-attn where it is installed, and a twin in plain PyTorch that
takes the same arguments, differentiates by autograd and runs in any dtype on any device: what tests and the self-test
at start compare with.

Legend: T tokens of the row, K gathered keys, n segments.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo.types import Segments

Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
"""kernel(query (T, heads, d), key (K, kv_heads, d), value (K, kv_heads, d), segments, scaling) -> (T, heads, d)."""


class _Gather(torch.autograd.Function):
    """Rows of x in the order of kv_index; backward adds the two uses of a shared row without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kv_index: Tensor, own: Tensor, shared: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(own, shared, copies)
        return x.index_select(0, kv_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        own, shared, copies = ctx.saved_tensors
        total = grad.index_select(0, own)
        twice = total.index_select(0, shared) + grad.index_select(0, copies)
        return total.index_copy_(0, shared, twice), None, None, None, None


def gather(x: Tensor, segments: Segments) -> Tensor:
    """Keys or values of all segments.

    Args:
        x: (T, kv_heads, d).
        segments: Which rows see which.
    Returns:
        (K, kv_heads, d); x itself where no segment has a prefix.
    """
    if len(segments.copies) == 0:
        return x
    return _Gather.apply(x, segments.kv_index, segments.own, segments.shared, segments.copies)


def attend(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    """Attend within segments; arguments after the kernel, and result, as `attention_sdpa.attend`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    scaling = 1 / math.sqrt(q.shape[-1]) if scaling is None else scaling
    return kernel(q, gather(k, segments), gather(v, segments), segments, scaling)[None]


def eager(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """The twin: what every kernel computes, read from cu_q and cu_k, a segment at a time."""
    repeats = query.shape[1] // key.shape[1]
    starts_q, starts_k = segments.cu_q.tolist(), segments.cu_k.tolist()
    outputs = []
    for i in range(len(starts_q) - 1):
        q = query[starts_q[i] : starts_q[i + 1]].transpose(0, 1)  # (heads, q, d)
        rows = slice(starts_k[i], starts_k[i + 1])
        k, v = (x[rows].transpose(0, 1).repeat_interleave(repeats, dim=0) for x in (key, value))
        scores = q @ k.transpose(1, 2) * scaling  # (heads, q, k)
        visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        outputs.append((scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def arguments_of(parameters: Any, *, heads: int, kv_heads: int, scaling: float) -> tuple[dict[str, Any], bool]:
    """How this torch's varlen_attn is told of causality, grouped heads and scale.

    torch 2.10 takes is_causal, 2.12 a window and enable_gqa; what lies between is told by the signature.

    Args:
        parameters: Names of its parameters.
        heads, kv_heads: Of the model.
        scaling: Factor on the scores.
    Returns:
        Keyword arguments, and whether keys and values must be repeated for the query heads that share them.
    Raises:
        NotImplementedError: If it knows no way to be causal, or no scale.
    """
    if "window_size" in parameters:
        arguments: dict[str, Any] = {"window_size": (-1, 0)}
    elif "is_causal" in parameters:
        arguments = {"is_causal": True}
    else:
        raise NotImplementedError("this torch's varlen_attn takes neither window_size nor is_causal")
    if "scale" not in parameters:
        raise NotImplementedError("this torch's varlen_attn takes no scale")
    arguments["scale"] = scaling
    if heads == kv_heads:
        return arguments, False
    if "enable_gqa" in parameters:
        return arguments | {"enable_gqa": True}, False
    return arguments, True


@functools.cache
def torch_varlen() -> Kernel:
    """PyTorch's own kernel: CUDA, fp16 and bf16.

    Raises:
        ImportError: If this torch has none.
    """
    from torch.nn.attention.varlen import varlen_attn

    parameters = frozenset(inspect.signature(varlen_attn).parameters)

    def kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        arguments, repeat = arguments_of(parameters, heads=heads, kv_heads=kv_heads, scaling=scaling)
        if repeat:
            key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        s = segments
        return varlen_attn(query, key, value, s.cu_q, s.cu_k, s.longest_q, s.longest_k, **arguments)  # type: ignore[return-value]

    return kernel


@functools.cache
def flash() -> Kernel:
    """flash-attn's kernel, where that package is installed: CUDA, fp16 and bf16.

    Raises:
        ImportError: If it is not.
    """
    from flash_attn import flash_attn_varlen_func

    def kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
        s = segments
        # PyTorch's kernel asks for it itself.
        more = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
        return flash_attn_varlen_func(
            query, key, value, s.cu_q, s.cu_k, s.longest_q, s.longest_k, softmax_scale=scaling, causal=True, **more
        )

    return kernel
