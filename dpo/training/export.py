"""Weights of a policy as a folder in Hugging Face form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dpo.config import Config
from dpo.estimate import STATES, checkpoint_bytes
from dpo.model import adapters
from dpo.model.load import save_folder
from dpo.run.setup import Setup
from dpo.runtime.checkpoint import save
from dpo.runtime.engine import DTYPES
from dpo.runtime.folders import publish
from dpo.runtime.weights import full_state, num_parameters
from dpo.training.policy import Policy
from dpo.types import TrainState


def dtype_of(config: Config, start: torch.dtype) -> torch.dtype:
    """Dtype of exported weights: train.export_dtype, by default that of the starting weights."""
    wanted = config.train.export_dtype
    return start if wanted == "auto" else DTYPES[wanted]


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


def save_checkpoint(
    setup: Setup, policy: Policy, state: TrainState, *, kind: str = "step", more: Callable[[Path], None] | None = None
) -> None:
    """Write a checkpoint of a stage, of the weights alone where train.save_weights_only asks for that; collective.

    Args:
        setup: The run.
        policy: Under training.
        state: Where the stage stands.
        kind: See `checkpoint.step_folder`.
        more: Writes into the folder what else the run needs; called on every rank.
    Raises:
        UserError: If there is no room for it.
    """
    train, weights = setup.config.train, None
    if train.save_weights_only:
        weights = partial(write_weights, setup, policy, dtype=setup.dtype, card=None)
    expected = checkpoint_bytes(
        num_parameters(policy.scorer, trained=True), stage=setup.zero_stage,
        half=setup.precision != "fp32", weights_only=train.save_weights_only, states=STATES[setup.config.optim.name],
    )  # fmt: skip
    save(
        policy.engine, setup.run, state, setup.world, train.keep_checkpoints, more, precision=setup.precision,
        weights=weights, kind=kind, expected_bytes=expected,
    )  # fmt: skip
