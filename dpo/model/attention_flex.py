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

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo.types import Segments

Visible = Callable[[Any, Any, Tensor, Tensor], Tensor]
BLOCK = 128
"""Rows of a block."""
SHAPES = 64
"""Variants of the kernel that may be compiled: grouped heads or not, windows, dtypes, with gradient and without. Torch
allows 8."""


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


def seen_blocks(segments: Segments, length: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys each block of queries has to look at, from the bounds of the segments: no T x T mask.

    Args:
        segments: Covering the row.
        length: T.
        window: See `visible_rows`.
    Returns:
        (blocks, blocks) bool twice: where some row sees some row, and where all rows see all rows.
    """
    count = -(-length // BLOCK)
    some, every = np.zeros((count, count), dtype=bool), np.zeros((count, count), dtype=bool)
    for segment in segments.items:
        start, end, prefix, prefix_end = segment.start, segment.end, segment.prefix_start, segment.prefix_end
        for block in range(start // BLOCK, (end - 1) // BLOCK + 1):
            first, last = max(start, block * BLOCK), min(end, (block + 1) * BLOCK) - 1  # its rows of this segment
            reach = length if window is None else window - 1
            some[block, max(start, first - reach) // BLOCK : last // BLOCK + 1] = True
            nearest = max(prefix, prefix_end + first - start - reach)
            if nearest < prefix_end:
                some[block, nearest // BLOCK : (prefix_end - 1) // BLOCK + 1] = True
            if window is None and last - first + 1 == BLOCK:
                every[block, -(-start // BLOCK) : block] = True
                every[block, -(-prefix // BLOCK) : prefix_end // BLOCK] = True
    return some, every


def block_mask(segments: Segments, length: int, window: int | None, device: torch.device) -> BlockMask:
    """What FlexAttention skips, what it computes whole, and what it asks `visible_rows` about."""
    some, every = seen_blocks(segments, length, window)

    def listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        """(1, 1, blocks) int32: how many; (1, 1, blocks, blocks) int32: which, the others after them."""
        order = np.argsort(~blocks, axis=1, kind="stable")
        tensors = (torch.from_numpy(x.astype(np.int32))[None, None] for x in (blocks.sum(axis=1), order))
        count, which = (x.to(device, non_blocking=True) for x in tensors)
        return count, which

    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=BLOCK, mask_mod=visible_rows(segments, window),
        seq_lengths=(length, length),
    )


def capped(softcap: float | Tensor) -> Callable[..., Tensor]:
    """score -> softcap * tanh(score / softcap). Compiled, the cap must be a tensor: of a number that a function closes
    over torch makes one on the host, which the kernel cannot read."""

    def cap(score: Tensor, *_: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _kernel(fused: bool) -> Callable[..., Any]:
    attend_blocks: Any = flex_attention
    if not fused:
        return attend_blocks
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(attend_blocks, dynamic=True, fullgraph=True)


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
        segments.made[window] = block_mask(segments, query.shape[2], window, query.device)
    cap = None if softcap is None else capped(torch.full((), softcap, device=query.device))
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
        scores = capped(softcap)(scores)
    rows = torch.arange(query.shape[2], device=query.device)
    visible = visible_rows(segments, window)(0, 0, rows[:, None], rows[None, :])
    return (scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v).transpose(1, 2)
