"""The policy under training and the frozen reference beside it: loaded, placed, checked against the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo.config import Config
from dpo.data.planner import Layout
from dpo.errors import UserError
from dpo.model import load
from dpo.model.check import settle, use_layout
from dpo.model.forward import Scorer
from dpo.model.reference import Reference, online
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import together
from dpo.setup import Setup
from dpo.types import PackedBatch

CHECKPOINTING_FROM = 2e9
"""Parameters above which activations are recomputed on a GPU by default."""


@dataclass
class Policy:
    """A policy under training.

    Attributes:
        engine: DeepSpeed's, around the scorer.
        scorer: Backbone and head.
        layout: The one that is exact for this model.
        notes: Lines for the log.
    """

    engine: Any
    scorer: Scorer
    layout: Layout
    notes: list[str]

    def score(self, batch: PackedBatch) -> Tensor:
        """Log-probs of a batch through the engine."""
        return self.engine(batch)


@dataclass(frozen=True)
class FrozenReference:
    """The reference beside a policy under training.

    Attributes:
        logps: reference(batch) -> PairLogps, without gradient.
        scorer: Backbone and head, for samples.
    """

    logps: Reference
    scorer: Scorer


def _load(setup: Setup, path: str, dtype: torch.dtype) -> Any:
    model = setup.config.model
    sharded = deepspeed_engine.zero_stage(setup.engine_config) == 3
    loaded = together(
        lambda: load.load_model(
            path, dtype=dtype, seed=setup.config.train.seed, trust_remote_code=model.trust_remote_code,
            revision=model.revision if path == model.policy else None,
            zero3_config=setup.engine_config if sharded else None,
        )
    )
    if len(setup.tokenizer) > loaded.get_input_embeddings().num_embeddings:
        raise UserError("the tokenizer has more tokens than the policy; use the policy's own tokenizer")
    return loaded


def _longest_sequence(setup: Setup) -> int:
    lengths = setup.train_pairs.lengths
    return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())


def start_policy(setup: Setup, path: str, model: Any = None) -> Policy:
    """Start the engine that trains a policy, with the layout that is exact for it; collective.

    Args:
        setup: The run.
        path: Weights to start from.
        model: The loaded policy; None to load it from `path`.
    Returns:
        The policy.
    Raises:
        UserError: If the model cannot be loaded or scored faithfully.
    """
    config, world = setup.config, setup.world
    model = _load(setup, path, setup.dtype) if model is None else model
    notes: list[str] = []
    if _checkpointing(config, model, world.device):
        load.checkpoint_activations(model)
        notes.append("activations: recomputed in backward (model.gradient_checkpointing)")
    scorer = Scorer(model)
    engine = deepspeed_engine.start_training(scorer, setup.engine_config, config.optim)
    by_length = setup.train_pairs.lengths.sum(axis=1).argsort()
    middle = [setup.train_pairs[int(i)] for i in by_length[len(by_length) // 2 :][:2]]
    layout, given_up = settle(scorer, config.train.layout, middle, _longest_sequence(setup), world.device)
    notes += given_up
    attention = "one causal call per row" if layout == "padded" else "sdpa per segment"
    size = f"{_count(model) / 1e6:.1f}M parameters in {setup.precision}"
    notes.append(f"layout: {layout}; attention: {attention}; {size}")
    return Policy(engine, scorer, layout, notes)


def start_models(setup: Setup, path: str) -> tuple[Policy, FrozenReference]:
    """Start the policy and the reference that is frozen beside it; collective.

    Under ZeRO 1 and 2 the reference is a plain copy of the loaded policy, under ZeRO-3 a second sharded engine.

    Args:
        setup: The run.
        path: Weights that both start from.
    Returns:
        Policy and reference.
    Raises:
        UserError: If the model cannot be loaded or scored faithfully.
    """
    world = setup.world
    sharded = deepspeed_engine.zero_stage(setup.engine_config) == 3
    dtype, reason = reference_dtype(setup.config.reference.dtype, setup.dtype, world.device, sharded)
    model = _load(setup, path, setup.dtype)
    if sharded:
        scorer = Scorer(_load(setup, path, dtype))
        score = deepspeed_engine.start_frozen(scorer, setup.engine_config, dtype)
    else:
        scorer = Scorer(load.frozen_copy(model, dtype)).to(world.device)
        score = scorer
    policy = start_policy(setup, path, model)
    policy.notes.insert(0, f"reference: {str(dtype).removeprefix('torch.')}, frozen ({reason})")
    use_layout(scorer, policy.layout, policy.scorer.own_head)
    return policy, FrozenReference(online(score), scorer)


def reference_dtype(
    wanted: str, policy_dtype: torch.dtype, device: torch.device, sharded: bool
) -> tuple[torch.dtype, str]:
    """The reference's dtype and why."""
    if wanted not in ("auto", "policy"):
        return deepspeed_engine.DTYPES[wanted], "reference.dtype"
    if wanted == "policy" or sharded:
        return policy_dtype, "the policy's dtype" + (" under ZeRO-3" if sharded else "")
    if device.type == "cuda":
        return torch.float16, "half the memory, and log-probs closer than bf16"
    return policy_dtype, "the policy's dtype: half precision products are slow on a CPU"


def _count(model: torch.nn.Module) -> int:
    counts: Callable[[Any], int] = lambda p: getattr(p, "ds_numel", p.numel())  # noqa: E731
    return sum(counts(p) for p in model.parameters())


def _checkpointing(config: Config, model: torch.nn.Module, device: torch.device) -> bool:
    wanted = config.model.gradient_checkpointing
    return wanted if wanted != "auto" else device.type == "cuda" and _count(model) > CHECKPOINTING_FROM
