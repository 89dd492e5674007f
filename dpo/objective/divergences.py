"""f-divergences: log-ratio -> score, f'(policy / reference).

DPO is the reverse KL, f(t) = t log t, whose f' is the log-ratio itself (up to a constant that the difference of a pair
cancels). Constants are those that make the score of equal models 0.

Source: Wang et al. 2023, "Beyond Reverse KL", arXiv:2309.16240; names and constants as in TRL.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.objective.catalog import Divergence

LARGEST_EXPONENT = 40.0
"""From here on an exponential is its tangent: finite in fp32 for any log-ratio of an answer, and with a gradient."""


def steady_exp(x: Tensor) -> Tensor:
    """e^x, and beyond LARGEST_EXPONENT its tangent there."""
    near = x.clamp(max=LARGEST_EXPONENT)
    return near.exp() * (1 + x - near)


def score(logratios: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """The score of completions under a divergence.

    reverse_kl  z
    forward_kl  1 - exp(-z)
    js          log 2 + logsigmoid(z)
    alpha       (exp((alpha - 1) z) - 1) / (alpha - 1);  alpha -> 1 is reverse_kl

    Args:
        logratios: (P,) z, policy minus reference, nats.
        divergence: Its name.
        alpha: Of the alpha divergence; 1 is the reverse KL.
    Returns:
        (P,); 0 where the log-ratio is 0.
    Raises:
        KeyError: If there is no divergence of that name.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha - 1) < 1e-6):
        return logratios
    if divergence == "forward_kl":
        return 1 - steady_exp(-logratios)
    if divergence == "js":
        return math.log(2) + logsigmoid(logratios)
    if divergence == "alpha":
        return (steady_exp((alpha - 1) * logratios) - 1) / (alpha - 1)
    raise KeyError(divergence)
