"""What is reported of pairs: sums on the device, merged over micro-batches and ranks, divided once a log line.

A mean of means would weigh a rank's pairs by how many it happened to get; sums and one count do not.
"""

from __future__ import annotations

import math

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
        (8,) fp64 on the device: sums in the order of NAMES, then P.
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
    return torch.stack([column.double().sum() for column in columns])


def averages(totals: Tensor) -> dict[str, float]:
    """Means over pairs.

    Args:
        totals: (8,) as `sums` gives, summed over micro-batches and ranks.
    Returns:
        Name -> mean, NaN over no pairs; reads the device once.
    """
    *values, count = totals.tolist()
    return {name: value / count if count else math.nan for name, value in zip(NAMES, values, strict=True)}
