"""Weights of a policy as a folder in Hugging Face form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dpo.config import Config
from dpo.model import adapters
from dpo.model.load import save_folder
from dpo.policy import Policy
from dpo.runtime.checkpoint import publish
from dpo.runtime.engine import DTYPES
from dpo.runtime.weights import full_state
from dpo.setup import Setup


def dtype_of(config: Config, start: torch.dtype) -> torch.dtype:
    """Dtype of exported weights: train.export_dtype, by default that of the starting weights."""
    wanted = config.train.export_dtype
    return start if wanted == "auto" else DTYPES[wanted]


def final_dtype(setup: Setup) -> torch.dtype:
    """Dtype of `final/`."""
    return dtype_of(setup.config, setup.start_dtype)


def write_weights(setup: Setup, policy: Policy, folder: Path, dtype: torch.dtype, card: str | None) -> None:
    """Write the engine's weights or adapter, as they were evaluated, with the tokenizer; collective.

    Args:
        setup: The run.
        policy: Its engine holds the weights.
        folder: Appears whole or not at all.
        dtype: Of the weights in the folder.
        card: README.md of the folder; None for none.
    """
    model = policy.scorer.model
    state = full_state(model, dtype, keep=setup.world.is_main, trained_only=setup.trains_adapters)

    def write(target: Path) -> None:
        if setup.trains_adapters:
            adapters.save(model, state, setup.tokenizer, target)
        else:
            save_folder(model, state, dtype, setup.tokenizer, target)
        if card is not None:
            (target / "README.md").write_text(card, encoding="utf-8")

    publish(folder, write, setup.world)


def weights_alone(setup: Setup, policy: Policy) -> Callable[[Path], None] | None:
    """What writes the weights of a checkpoint that holds nothing else of the engine; None where it holds all."""
    if not setup.config.train.save_weights_only:
        return None
    return lambda folder: write_weights(setup, policy, folder, setup.dtype, card=None)
