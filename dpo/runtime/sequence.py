"""The ranks that compute one row together: DeepSpeed's Ulysses attention, and sums over their group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo.model.sequence import SequenceGroup
from dpo.runtime import distributed
from dpo.runtime import engine as deepspeed_engine


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
    group, rank = distributed.neighbours(size)
    heads = config.get_text_config().num_attention_heads
    ulysses = deepspeed_engine.exchanging_attention(_attend, config, group)

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
