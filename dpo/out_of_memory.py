"""A stage that runs out of memory is started again with smaller micro-batches, and goes on from its newest checkpoint.

Where the costliest micro-batch was run before the first step (`budget.py`) this should not happen. Under ZeRO-3, and
where ranks compute a row together, its size is an estimate; and whatever else is on a GPU may grow.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpo.data.planner import Layout, num_tokens
from dpo.model import load
from dpo.policy import Policy
from dpo.room import largest
from dpo.runtime import heartbeat
from dpo.runtime.distributed import give_up
from dpo.runtime.files import write_whole
from dpo.setup import Setup


def is_lack_of_memory(error: RuntimeError) -> bool:
    """Whether an error is for want of memory: cuBLAS, and kernels that are loaded, have errors of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search("out of memory|ALLOC_FAILED", str(error)))


def read_budget(path: Path) -> dict[str, Any] | None:
    """What `budget.fit_budget` has written; None where there is nothing that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def lowered_budget(setup: Setup, policy: Policy, layout: Layout, name: str) -> Iterator[None]:
    """Where memory runs out within the block, write down less for the next start and end this one.

    Args:
        setup: Of `budget.fit_budget`.
        policy: The policy.
        layout: Of the micro-batches.
        name: Of the file that `fit_budget` has written.
    Raises:
        UserError: By one process alone; of several the rank that lacks memory leaves, and ends the job.
    """
    try:
        yield
    except RuntimeError as error:
        found, budget = read_budget(setup.run / name), setup.token_budget
        if found is None or budget is None or not is_lack_of_memory(error):
            raise
        of_row, model = setup.config.train.sequence_parallel_size, policy.scorer.model
        longest = math.ceil(int(num_tokens(setup.train_pairs.lengths, layout).max()) / of_row)
        # Of a budget that no micro-batch fills half may be as large.
        used = min(budget, math.ceil(largest(setup, layout, budget) / of_row))
        less = max(longest, used // 2)
        change: dict[str, Any] = {"tokens": less, "evaluation": less}
        again = f"start again: it goes on with {less:,} ({name})"
        if less >= used:
            may = setup.config.model.gradient_checkpointing == "auto" and model.supports_gradient_checkpointing
            may = may and not load.recomputes_activations(model)
            change = {"recomputed": True} if may else {}
            again = f"start again: it goes on with activations recomputed ({name})" if may else (
                "lower data.max_length, allow model.gradient_checkpointing, use more GPUs, or ZeRO-3"
            )  # fmt: skip
        write_whole(setup.run / name, json.dumps(found | change))
        where = f"out of memory {heartbeat.place()} with micro-batches of {used:,} tokens"
        give_up(setup.world, f"{where}; {again}")
