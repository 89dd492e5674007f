"""One packed row computed by several ranks, each a cut of its tokens: long context.

    every rank   the same pairs, laid out as one row of T tokens
    backbone     T / R tokens a rank; in attention the ranks exchange tokens for heads (Ulysses), so that each attends
                 over the whole row with its share of the heads
    head         the scored tokens of the rank's own cut; their sums per sequence are added over the R ranks

After the sum every rank knows the log-probs of all S sequences and computes the same loss. What its backward pass then
leaves on a rank is that rank's own part of the gradient of the loss; the parts add up to the whole. Ulysses: Jacobs et
al. 2023, arXiv:2309.14509. Legend: R ranks of a group, T tokens, N scored tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dpo.data.batch import filled
from dpo.errors import UserError
from dpo.types import PackedBatch


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """This rank's place among those that compute a row together.

    Attributes:
        rank: Which cut is its own, 0 to size - 1.
        size: R.
        add: Adds a tensor over the ranks; the gradient passes through as it is.
        exchange: exchange(attend, module, query, key, value): attention over the whole row. The three are those of the
            cut, (1, heads, T / R, head_dim); attend gets (1, heads / R, T, head_dim).
    """

    rank: int
    size: int
    add: Callable[[Tensor], Tensor]
    exchange: Callable[[Callable[[Tensor, Tensor, Tensor], Tensor], nn.Module, Tensor, Tensor, Tensor], Tensor]

    def cut(self, batch: PackedBatch) -> PackedBatch:
        """This rank's part of a batch that all ranks of the group hold.

        Args:
            batch: Of one packed row.
        Returns:
            Tokens and scored tokens of the cut; segments are those of the whole row, filled up to a multiple of R.
        """
        whole = filled(batch, self.size)
        length = len(whole.input_ids) // self.size
        start = self.rank * length
        own = (whole.score_index >= start) & (whole.score_index < start + length)
        changed: dict[str, Any] = {
            name: getattr(whole, name)[start : start + length] for name in ("input_ids", "position_ids")
        }
        changed |= {name: getattr(whole, name)[own] for name in ("target_ids", "sequence_ids")}
        weights, read = whole.token_weights, whole.predicting
        return replace(
            whole, **changed, score_index=whole.score_index[own] - start,
            predicting=read[(read >= start) & (read < start + length)] - start,
            token_weights=None if weights is None else weights[own],
        )  # fmt: skip


def heads_complaint(config: Any, size: int) -> str | None:
    """Why the heads of a model cannot be shared out over `size` ranks; None if they can."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    of_keys = getattr(text, "num_key_value_heads", None) or heads
    if heads % size:
        return f"its {heads} attention heads are no multiple of {size}"
    if of_keys % size and size % of_keys:
        return f"its {of_keys} key heads are neither a multiple nor a divisor of {size}"
    return None


def sequence_notes(across: SequenceGroup | None, router_coefficient: float) -> list[str]:
    """Say how rows are cut.

    Args:
        across: None for whole rows, of which nothing is said.
        router_coefficient: Weight of the load-balancing loss.
    Raises:
        UserError: If the model needs all tokens of a row in one place.
    """
    if across is None:
        return []
    size = f"train.sequence_parallel_size is {across.size}"
    if router_coefficient:
        raise UserError(f"{size}, and a load-balancing loss needs all tokens on a rank; set loss.router_aux_coef 0")
    return [f"long context: {across.size} ranks compute a row together, each a cut of its tokens ({size})"]
