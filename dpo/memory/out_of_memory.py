"""A stage that runs out of memory is started again with smaller micro-batches, and goes on from its newest checkpoint.

Where the costliest micro-batch was run before the first step (`budget.py`) this should not happen. Under ZeRO-3, and
where ranks compute a row together, its size is an estimate; and whatever else is on a GPU may grow. What a stage may
put into a micro-batch stands in a file of the run directory, which is written and read here:

    micro_batches.json     tokens a micro-batch, whether activations are recomputed, and what that was found for
    sft_micro_batches.json the same of the SFT stage
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo.memory.room import largest
from dpo.model import blocks
from dpo.run.setup import Setup
from dpo.runtime import heartbeat
from dpo.runtime.distributed import World, give_up
from dpo.runtime.files import write_whole
from dpo.training.policy import Policy


@dataclass(frozen=True, slots=True)
class Budget:
    """What a micro-batch may hold.

    Attributes:
        tokens: Of a micro-batch of training, at most.
        evaluation: The same where there is no gradient.
        recomputed: Whether activations are recomputed in backward.
        found_for: Setting or fact -> value: what it holds for.
    """

    tokens: int
    evaluation: int
    recomputed: bool
    found_for: dict[str, Any]


def read_budget(path: Path) -> Budget | None:
    """What `write_budget` has left; None where there is nothing that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        own = {name: found.pop(name) for name in ("tokens", "evaluation", "recomputed")}
        return Budget(**own, found_for=found)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_budget(path: Path, budget: Budget) -> None:
    """Write a budget down for the next start of the stage."""
    own = {"tokens": budget.tokens, "evaluation": budget.evaluation, "recomputed": budget.recomputed}
    write_whole(path, json.dumps(budget.found_for | own))


def is_lack_of_memory(error: RuntimeError) -> bool:
    """Whether an error is for want of memory: cuBLAS, and kernels that are loaded, have errors of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search("out of memory|ALLOC_FAILED", str(error)))


def may_recompute(setup: Setup, model: Any) -> bool:
    """Whether activations are kept and need not be."""
    allowed = setup.config.model.gradient_checkpointing == "auto" and model.supports_gradient_checkpointing
    return allowed and not blocks.recomputes_activations(model)


@contextmanager
def explained(world: World, advice: str) -> Iterator[None]:
    """Where memory runs out within the block, which no micro-batch of training is in, say what to do and end.

    Raises:
        UserError: See `give_up`.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        give_up(world, f"out of memory {heartbeat.place()}; {advice}")


@contextmanager
def lowered(setup: Setup, policy: Policy, path: Path) -> Iterator[None]:
    """Where memory runs out within the block, write down less for the next start and end this one.

    Args:
        setup: With the budget that was found.
        policy: The policy.
        path: Of the budget.
    Raises:
        UserError: By one process alone; of several the rank that lacks memory leaves, and ends the job.
    """
    try:
        yield
    except RuntimeError as error:
        found, budget = read_budget(path), setup.token_budget
        if found is None or budget is None or not is_lack_of_memory(error):
            raise
        # Of a budget that no micro-batch fills half may be as large.
        used = min(budget, math.ceil(largest(setup, policy.layout, budget) / setup.ranks_a_row))
        less = max(setup.longest_row(policy.layout), used // 2)
        if less < used:
            found = replace(found, tokens=less, evaluation=less)
            advice = f"start again: it goes on with {less:,} ({path.name})"
        elif may_recompute(setup, policy.scorer.model):
            found = replace(found, recomputed=True)
            advice = f"start again: it goes on with activations recomputed ({path.name})"
        else:
            advice = "lower data.max_length, allow model.gradient_checkpointing, use more GPUs, or ZeRO-3"
        write_budget(path, found)
        give_up(setup.world, f"out of memory {heartbeat.place()} with micro-batches of {used:,} tokens; {advice}")
