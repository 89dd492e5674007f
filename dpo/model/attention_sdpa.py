"""Attention over segments by scaled dot product, segment by segment: runs anywhere, fastest on a CPU.

Two calls a pair do it exactly, without a mask over the whole row: for the segment that starts with the prompt a causal
one, for the rejected completion one over [prompt | completion] whose causal mask is aligned to the bottom right.

Legend: T tokens of the row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo.model.products import widened
from dpo.types import Segments


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """Attend within segments.

    Args:
        query: (1, heads, T, head_dim).
        key, value: (1, kv_heads, T, head_dim); kv_heads divides heads.
        segments: Which rows see which.
        scaling: Factor on the scores; None for 1 / sqrt(head_dim).
    Returns:
        (1, T, heads, head_dim).
    """
    dtype = query.dtype
    query, key, value = widened(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    # One split, not a slice a segment: backward of a slice fills a tensor as long as the whole row with zeros.
    sizes = [s.end - s.start for s in segments.items]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    starting_at = {s.start: i for i, s in enumerate(segments.items)}
    outputs = []
    for s, q, k, v in zip(segments.items, queries, keys, values, strict=True):
        mask = None
        width = s.prefix_end - s.prefix_start
        if width > 0:
            owner = starting_at[s.prefix_start]
            k = torch.cat((keys[owner][:, :, :width], k), dim=2)
            v = torch.cat((values[owner][:, :, :width], v), dim=2)
            shape = (q.shape[2], k.shape[2])
            mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)
