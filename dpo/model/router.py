"""The load-balancing loss of a mixture of experts: transformers' own function, on the tokens of one micro-batch.

    loss = E sum_e f_e p_e      f_e: assignments to expert e a token; p_e: its mean router probability; E experts

It is a product of two means over the tokens it is given, so that it is by nature a quantity of a micro-batch: unlike
the objective it changes with how pairs are spread. Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dpo.errors import UserError

Balance = Callable[[tuple[Tensor, ...]], Tensor]


def balance_of(model: Any) -> Balance | None:
    """The load-balancing loss that a model's own code computes; None for a model that has none.

    Args:
        model: A causal language model of transformers.
    Returns:
        balance(router_logits) -> scalar fp32; router_logits has (T, E) for every layer.
    """
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, chosen = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if function is None or experts is None or chosen is None:
        return None
    return lambda router_logits: function(router_logits, experts, chosen)


def coefficient(model: Any, wanted: float | None) -> float:
    """Weight of the load-balancing loss.

    Args:
        model: The policy.
        wanted: loss.router_aux_coef; None for what the model's config says, if it asks for router logits.
    Raises:
        UserError: If it is wanted of a model that has none.
    """
    config = model.config.get_text_config()
    if wanted is None:
        wanted = config.router_aux_loss_coef if getattr(config, "output_router_logits", False) else 0.0
    if wanted and balance_of(model) is None:
        raise UserError(
            f"loss.router_aux_coef is {wanted} and {type(model).__name__} has no load-balancing loss; leave it out"
        )
    return float(wanted)
