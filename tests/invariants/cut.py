"""What two ranks that compute a row together get of it in fp64, beside what each gets of the whole row alone."""

from __future__ import annotations

from typing import Any

import torch

from dpo.data.batch import collate
from dpo.model import blocks
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.runtime import distributed, sequence
from tests import tiny


def gaps() -> dict[str, float]:
    """Largest differences of log-probs and gradients over families, layouts and batches; collective, on two ranks.

    Gradients are those of a loss that is not linear in the log-probs, summed over ranks, relative to the largest entry.
    """
    pairs = tiny.pairs(5)
    # An odd row; one whose first half holds no scored token; none; a rank's cut that ends within a completion.
    batches = [pairs, [pairs[0]], [], [max(pairs, key=lambda p: len(p.prompt_ids) - len(p.chosen_ids))]]
    found = {"logps": 0.0, "gradient": 0.0, "largest_gradient": 0.0}
    for family, changes in (("llama", {}), ("gpt2", {}), ("llama", {"num_key_value_heads": 1})):
        model = tiny.model(family, **changes)
        scorer, whole = Scorer(model), Scorer(model)
        scorer.across = sequence.join(2, model.config)
        assert scorer.across is not None
        if family == "gpt2":
            blocks.checkpoint_activations(model)
        for layout in ("shared", "packed"):
            use_layout(scorer, layout)  # type: ignore[arg-type]
            for chosen in batches:
                batch = collate(chosen, layout)  # type: ignore[arg-type]
                (truth, expected), (logps, parts) = _scored(whole, batch), _scored(scorer, batch)
                if chosen:
                    found["logps"] = max(found["logps"], float((logps - truth).abs().max()))
                for part, entry in zip(parts, expected, strict=True):
                    gap = (distributed.sum_over_ranks(part) - entry).abs().max()
                    found["gradient"] = max(found["gradient"], float(gap / entry.abs().max().clamp_min(1)))
                    found["largest_gradient"] = max(found["largest_gradient"], float(entry.abs().max()))
    return found


def _scored(scorer: Scorer, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logps = scorer(batch)
    loss = logps.square().sum() / 100
    gradients = torch.autograd.grad(loss, list(scorer.model.parameters()), allow_unused=True)
    return logps.detach(), [
        torch.zeros_like(p) if g is None else g for g, p in zip(gradients, scorer.model.parameters(), strict=True)
    ]
