"""Attention over the segments of a packed row, as a kernel that transformers calls by name.

A packed row holds many causal segments; the rejected completion of a prefix-shared pair reads its prompt's keys and
values as well. Two scaled-dot-product calls a pair do this exactly, without a mask over the whole row: for the segment
that starts with the prompt a causal one, for the rejected completion one over [prompt | completion] whose causal mask
is aligned to the bottom right. The idea of one row per pair: Wang & Hegde 2024, arXiv:2410.20305.

Segments travel to every layer as the keyword argument `segments` of the model's call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dpo.types import Segment

NAME = "dpo_segments"
"""What the models are told to use; a private name, because position_ids without these segments would be silently
wrong: transformers takes their jumps for a new document and hides the prompt from the rejected completion."""


class UnsupportedAttention(Exception):
    """The model asks for something segments cannot express; the message says what."""


def _refuse(kwargs: dict[str, Any], segments: tuple[Segment, ...]) -> None:
    if kwargs.get("softcap") is not None:
        raise UnsupportedAttention(f"attention scores are soft-capped at {kwargs['softcap']}")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedAttention("attention has sinks")
    window = kwargs.get("sliding_window")
    longest = max(s.end - s.start + s.prefix_end - s.prefix_start for s in segments)
    if window is not None and longest > window:
        raise UnsupportedAttention(f"a sliding window of {window} tokens is shorter than a sequence of {longest}")


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: tuple[Segment, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within segments; the signature is that of transformers' attention functions.

    Args:
        module: The attention layer; not used.
        query: (1, heads, T, head_dim).
        key, value: (1, kv_heads, T, head_dim); kv_heads divides heads.
        attention_mask: Must be None: segments say everything.
        scaling: Factor on the scores; None for 1 / sqrt(head_dim).
        dropout: Ignored: policy and reference are compared token by token, so both are deterministic.
        segments: Which rows see which, covering 0..T in order; a prefix is the start of an earlier segment.
    Returns:
        (1, T, heads, head_dim) and None for the attention weights.
    Raises:
        UnsupportedAttention: For soft-capped scores, sinks, or a sliding window shorter than a segment.
    """
    if segments is None or attention_mask is not None:
        raise UnsupportedAttention("the model does not hand keyword arguments down to its attention layers")
    _refuse(kwargs, segments)
    grouped = query.shape[1] != key.shape[1]
    # One split, not a slice a segment: backward of a slice fills a tensor as long as the whole row with zeros.
    sizes = [s.end - s.start for s in segments]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    starting_at = {s.start: i for i, s in enumerate(segments)}
    outputs = []
    for s, q, k, v in zip(segments, queries, keys, values, strict=True):
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
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def register() -> None:
    """Make `segment_attention` known to transformers under NAME; calling it again changes nothing."""
    AttentionInterface.register(NAME, segment_attention)


@contextmanager
def counted_calls() -> Iterator[list[nn.Module]]:
    """Collect the layers that attend in segments within the block: a layer that mixes tokens in any other way (state
    space, linear attention, convolution) would let one sequence see another."""
    layers: list[nn.Module] = []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        layers.append(module)
        return segment_attention(module, *args, **kwargs)

    AttentionInterface.register(NAME, counted)
    try:
        yield layers
    finally:
        register()
