"""Attention over segments by FlexAttention, for models that change the scores: soft-capping, sliding windows.

Whether a row sees another is a function of both rows' numbers, compiled into the kernel; blocks of the row in which
nothing is visible are skipped. The twin evaluates the same functions over the whole row in plain PyTorch.

FlexAttention trains on CUDA alone. Legend: T tokens of the row, n segments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dpo.types import Segments

Visible = Callable[[Any, Any, Tensor, Tensor], Tensor]


def visible_rows(segments: Segments, window: int | None) -> Visible:
    """visible(batch, head, q, kv): whether row q sees row kv.

    Args:
        segments: Which rows see which.
        window: Tokens of its own sequence that a row sees, itself among them; None for all.
    """
    starts = segments.cu_q[:-1].contiguous()
    rows = torch.arange(int(segments.own.shape[0]), device=starts.device, dtype=torch.int32)
    number = torch.searchsorted(starts, rows, right=True) - 1  # (T,) segment of each row
    start = starts[number]
    prefix_start, prefix_end = segments.prefixes[number].unbind(1)  # (T,), (T,)

    def visible(batch: Any, head: Any, q: Tensor, kv: Tensor) -> Tensor:
        own = (number[q] == number[kv]) & (kv <= q)
        prefix = (kv >= prefix_start[q]) & (kv < prefix_end[q])
        if window is None:
            return own | prefix
        distance = torch.where(own, q - kv, q - start[q] + prefix_end[q] - kv)
        return (own | prefix) & (distance < window)

    return visible


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, *_: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _kernel(fused: bool) -> Callable[..., Any]:
    attend_blocks: Any = flex_attention
    return torch.compile(attend_blocks, dynamic=True) if fused else attend_blocks


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend within segments; arguments and result as `attention_sdpa.attend`.

    Args:
        window: See `visible_rows`.
        softcap: Scores s become softcap * tanh(s / softcap); None for none.
    """
    if window not in segments.made:
        length = query.shape[2]
        mask = create_block_mask(visible_rows(segments, window), None, None, length, length, device=str(query.device))
        segments.made[window] = mask
    cap = None if softcap is None else _capped(softcap)
    grouped = query.shape[1] != key.shape[1]
    arguments = {"score_mod": cap, "block_mask": segments.made[window], "scale": scaling, "enable_gqa": grouped}
    return _kernel(query.is_cuda)(query, key, value, **arguments).transpose(1, 2)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The twin: the same functions of the rows' numbers, the scores of the whole row at once."""
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ k.transpose(2, 3) * scaling  # (1, heads, T, T)
    if softcap is not None:
        scores = _capped(softcap)(scores)
    rows = torch.arange(query.shape[2], device=query.device)
    visible = visible_rows(segments, window)(0, 0, rows[:, None], rows[None, :])
    return (scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v).transpose(1, 2)
