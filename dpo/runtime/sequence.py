"""The ranks that compute one row together: DeepSpeed's Ulysses attention, and sums over their group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo.model.sequence import SequenceGroup
from dpo.runtime import distributed


class _Add(torch.autograd.Function):
    """Every rank computes the same loss from the sums, so that each has the whole gradient of them already."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        return distributed.sum_over_ranks(own.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def join(size: int, config: Any) -> SequenceGroup | None:
    """The group of this rank: ranks 0 to size - 1, size to 2 size - 1, ...; collective.

    Args:
        size: Ranks of a group; divides the world.
        config: Of the model; its heads can be shared out over them.
    Returns:
        The group; None for groups of one.
    """
    if size == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    group, rank = distributed.neighbours(size)
    text = config.get_text_config()
    heads = text.num_attention_heads
    # Not register_with_transformers: it sets module state of DeepSpeed that changes what engines average over.
    ulysses = UlyssesSPAttentionHF(
        attn=_attend,
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        kv_head_count=getattr(text, "num_key_value_heads", None) or heads,
        num_hidden_layers=text.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )

    def exchange(attend: Callable[..., Tensor], module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Ulysses gathers positions for kernels that read documents from them; ours reads segments.
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=query.device)
        output, _ = ulysses(module, query, key, value, None, attend=attend, position_ids=nothing)
        return output.view(*output.shape[:2], heads, -1)

    return SequenceGroup(rank, size, lambda own: _Add.apply(own, group), exchange)  # type: ignore[no-any-return]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, attend: Callable[..., Tensor], **_: Any
) -> tuple[Tensor, None]:
    return attend(query, key, value), None
