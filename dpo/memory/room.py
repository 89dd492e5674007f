"""How many tokens a GPU's memory has room for, told from the sizes of a model before anything is run; and how many the
costliest micro-batch has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpo.data.loader import Loader
from dpo.data.planner import Layout, num_tokens
from dpo.estimate import micro_batch_tokens, reduction_buckets
from dpo.model.head import CHUNK_ROWS
from dpo.model.shape import Shape
from dpo.run.setup import UNTRIED_TOKENS, Setup

LARGEST = 65536
"""Tokens beyond which a larger micro-batch gains nothing."""
LIVE_PARAMETERS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at a time by default (stage3_max_live_parameters)."""
ENOUGH_TOKENS = 8192
"""Tokens for which activations are rather kept than recomputed for more of them. An estimate, not measured."""
UNTRIED_MARGIN = 1.5
"""Room over what is needed, where no trial shows what the estimate has missed."""
SHARE_OF_FREE = 0.8
"""Share of the free memory that is planned with; the rest is for kernels' workspaces and the allocator's gaps."""


@dataclass(frozen=True, slots=True)
class Room:
    """The memory of a GPU for micro-batches, and what these need of it.

    Attributes:
        shape: Of the policy.
        dtype: Of its weights.
        free: Bytes, once models, optimizer states and gradients in fp32 are there.
        stage: ZeRO's: below 2 a micro-batch's own gradients are whole, 3 gathers weights.
        trained: Parameters that learn.
        longest: Tokens of the longest pair, which must fit.
        layout: Of the micro-batches.
        ranks_a_row: That compute a row together.
        chunk_rows: Rows of a tile of logits.
    """

    shape: Shape
    dtype: torch.dtype
    free: int
    stage: int
    trained: int
    longest: int
    layout: Layout
    ranks_a_row: int = 1
    chunk_rows: int = CHUNK_ROWS

    @property
    def is_tried(self) -> bool:
        """Whether the costliest micro-batch is run before the first step, so that an estimate may be wrong."""
        return self.stage < 3 and self.ranks_a_row == 1

    @property
    def most(self) -> int:
        """Tokens beyond which a micro-batch is not made larger."""
        return LARGEST if self.is_tried else UNTRIED_TOKENS

    def tokens(self, *, recomputed: bool) -> int:
        """How many may stand in a micro-batch; too many where activations cannot be told."""
        shape, width = self.shape, self.dtype.itemsize
        per_token = self._per_token(recomputed=recomputed) or shape.block_input
        reserved = 2 * self.chunk_rows * shape.vocabulary * 4 + min(self.trained, shape.vocabulary * shape.hidden) * 4
        whole = {2: 0, 3: min(shape.parameters, LIVE_PARAMETERS)}.get(self.stage, self.trained)
        return int(SHARE_OF_FREE * (self.free - reserved - whole * width) / per_token)

    def _per_token(self, *, recomputed: bool) -> float | None:
        # Of shared prompts as much as can be: nearly the whole row.
        return self.shape.kept(1, 1, is_shared=self.layout == "shared", recomputed=recomputed)

    def budget(self, *, recomputed: bool) -> int:
        """Tokens to try first: a multiple of 1,024 unless it is `longest`."""
        return max(self.longest, min(self.most, self.tokens(recomputed=recomputed)) // 1024 * 1024)

    def asks_for_recomputation(self, wanted: int) -> bool:
        """Whether activations of `wanted` tokens are better recomputed than kept.

        Recomputing them takes a quarter to a third of a step. Where nothing is tried they are kept only if half as many
        again would fit, and not beside experts whose weights are one tensor: of that ZeRO-3 keeps what it has gathered.
        """
        needed = max(self.longest, wanted)
        if self.is_tried:
            return self.tokens(recomputed=False) < needed
        uncertain = self.shape.has_fused_experts or self._per_token(recomputed=False) is None
        return uncertain or self.tokens(recomputed=False) < UNTRIED_MARGIN * needed


def first_step_bytes(
    zero: dict[str, Any], *, world_size: int, width: int, trained: int, largest: int, states: int
) -> int:
    """Bytes per GPU that the first step adds to weights and their fp32 copy: AdamW's states, gradients, and what
    DeepSpeed reduces these in. With an offloaded optimizer states and gradients are elsewhere.

    Args:
        zero: The section zero_optimization of DeepSpeed's config.
        world_size: Ranks.
        width: Bytes of a weight.
        trained: Parameters that learn.
        largest: Those of the largest tensor among them, whose gradient a bucket of ZeRO-2 may hold once more.
        states: Bytes a parameter of AdamW's states that are not there yet.
    """
    stage = zero.get("stage", 0)
    buckets = reduction_buckets(zero, width) + (2 * width * largest if stage == 2 else 0)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return buckets
    sharing = [world_size if stage >= level else 1 for level in (1, 2)]  # optimizer, gradients
    return buckets + states * trained // sharing[0] + 4 * trained // sharing[1]


def wanted_tokens(setup: Setup, layout: Layout) -> int:
    """Tokens for which activations are kept if they fit: those asked for, or else as many as keep a GPU busy, but no
    more than a rank has in a step.

    A micro-batch of ENOUGH_TOKENS is as fast as a larger one; under ZeRO-3, which gathers all weights for each of them,
    one of UNTRIED_TOKENS.

    Args:
        setup: The run.
        layout: Of the micro-batches.
    """
    train, epochs, loader = setup.config.train, setup.epochs, setup.loader(setup.train_pairs, layout)
    tokens = num_tokens(setup.train_pairs.lengths, layout)
    of_step = max(
        sum(int(tokens[ids].sum()) for ids in micro_batches)
        for step in setup.heaviest_steps(layout)
        for micro_batches in loader.plan_of(epochs.batch(step))
    )
    enough = UNTRIED_TOKENS if setup.zero_stage == 3 else ENOUGH_TOKENS
    asked = train.tokens_per_micro_batch
    limits = [math.ceil(of_step / setup.ranks_a_row), enough if asked == "auto" else asked]
    if train.micro_batch_size is not None:
        limits.append(train.micro_batch_size * setup.longest_row(layout))
    return min(limits)


def costliest(loader: Loader, steps: Iterable[int]) -> list[int]:
    """Pair ids of this rank's micro-batch with the most tokens, then the most completion tokens, of some steps."""
    cost, completions = num_tokens(loader.dataset.lengths, loader.layout), loader.dataset.lengths[:, 1:].sum(axis=1)
    candidates = [ids for step in steps for ids in loader.share_of(loader.epochs.batch(step))]
    return max(candidates, key=lambda ids: (int(cost[ids].sum()), int(completions[ids].sum())))


def largest(setup: Setup, layout: Layout, budget: int) -> int:
    """Tokens of this rank's costliest micro-batch under a budget."""
    loader = replace(setup, token_budget=budget).loader(setup.train_pairs, layout)
    ids = costliest(loader, setup.heaviest_steps(layout))
    return loader.row_tokens or int(micro_batch_tokens([[ids]], setup.train_pairs.lengths, layout).max())
