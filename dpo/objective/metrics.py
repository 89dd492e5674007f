"""What is reported of pairs: sums on the device, merged over micro-batches and ranks, divided once a log line.

A mean of means would weigh a rank's pairs by how many it happened to get; sums and one count do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo.types import LossOutput, PairLogps

NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""TRL's names, in the order of `sums`; the count of pairs follows."""


@torch.no_grad()
def sums(output: LossOutput, policy: PairLogps) -> Tensor:
    """Sum what is reported over the pairs of a micro-batch.

    A tie counts as one half in the accuracy, so that an exact start shows 0.5 and not 0.

    Args:
        output: Of the objective. Fields (P,).
        policy: Log-probs of the policy. Fields (P,).
    Returns:
        (8 + L,) fp64 on the device: sums in the order of NAMES, then P, then of each of L losses that were added up.
    """
    margins = output.chosen_rewards - output.rejected_rewards
    accuracies = (margins > 0).double() + 0.5 * (margins == 0).double()
    columns = (
        output.losses,
        output.chosen_rewards,
        output.rejected_rewards,
        margins,
        accuracies,
        policy.chosen,
        policy.rejected,
        torch.ones_like(margins),
    )
    parts = () if output.parts is None else output.parts
    return torch.stack([column.double().sum() for column in (*columns, *parts)])


def averages(totals: Tensor, losses: Sequence[str] = ()) -> dict[str, float]:
    """Means over pairs.

    Args:
        totals: (8 + L,) as `sums` gives, summed over micro-batches and ranks.
        losses: Names of the L losses; none for a single one.
    Returns:
        Name -> mean, NaN over no pairs, that of a loss in a sum as `loss/NAME`; reads the device once.
    """
    values = totals.tolist()
    count = values.pop(len(NAMES))
    names = (*NAMES, *(f"loss/{name}" for name in losses))
    return {name: value / count if count else math.nan for name, value in zip(names, values, strict=True)}
