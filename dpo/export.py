"""Weights of a policy as a folder in Hugging Face form."""

from __future__ import annotations

from pathlib import Path

import torch

from dpo.model.load import save_folder
from dpo.policy import Policy
from dpo.runtime.checkpoint import publish
from dpo.runtime.engine import DTYPES, full_state
from dpo.setup import Setup


def write_weights(setup: Setup, policy: Policy, folder: Path, card: str | None) -> None:
    """Write the engine's weights, as they were evaluated, with tokenizer and generation config; collective.

    Args:
        setup: The run; train.export_dtype decides the dtype, by default that of the starting weights.
        policy: Its engine holds the weights.
        folder: Appears whole or not at all.
        card: README.md of the folder; None for none.
    """
    wanted = setup.config.train.export_dtype
    dtype: torch.dtype = setup.start_dtype if wanted == "auto" else DTYPES[wanted]
    model = policy.scorer.model
    state = full_state(model, dtype, keep=setup.world.is_main)

    def write(target: Path) -> None:
        save_folder(model, state, dtype, setup.tokenizer, target)
        if card is not None:
            (target / "README.md").write_text(card, encoding="utf-8")

    publish(folder, write, setup.world)
