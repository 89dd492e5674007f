"""How many tokens a GPU's memory has room for, told from the sizes of a model before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpo.data.planner import Layout, num_tokens
from dpo.model.head import CHUNK_ROWS
from dpo.model.shape import Shape
from dpo.setup import LOOKED_AT, UNTRIED_TOKENS, Setup

LARGEST = 65536
"""Tokens beyond which a larger micro-batch gains nothing."""
LIVE_PARAMETERS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at a time by default (stage3_max_live_parameters)."""
ENOUGH_TOKENS = 8192
"""Tokens for which activations are rather kept than recomputed for more of them. An estimate, not measured."""
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
        chunk_rows: Rows of a tile of logits.
    """

    shape: Shape
    dtype: torch.dtype
    free: int
    stage: int
    trained: int
    longest: int
    layout: Layout
    chunk_rows: int = CHUNK_ROWS

    def tokens(self, *, recomputed: bool) -> int:
        """How many may stand in a micro-batch; too many where activations cannot be told."""
        shape, width = self.shape, self.dtype.itemsize
        # Of shared prompts as much as can be: nearly the whole row.
        per_token = shape.kept(1, 1, is_shared=self.layout == "shared", recomputed=recomputed) or shape.block_input
        reserved = 2 * self.chunk_rows * shape.vocabulary * 4 + min(self.trained, shape.vocabulary * shape.hidden) * 4
        whole = {2: 0, 3: min(shape.parameters, LIVE_PARAMETERS)}.get(self.stage, self.trained)
        reserved += whole * width
        return int(SHARE_OF_FREE * (self.free - reserved) / per_token)

    def budget(self, *, recomputed: bool, most: int) -> int:
        """Tokens to try first, up to `most`: a multiple of 1,024 unless it is `longest`."""
        return max(self.longest, min(most, self.tokens(recomputed=recomputed)) // 1024 * 1024)

    def asks_for_recomputation(self, wanted: int) -> bool:
        """Whether activations are better recomputed than kept, of no more than `wanted` tokens or of unknown size.

        Recomputing them takes a quarter to a third of a step; a micro-batch of ENOUGH_TOKENS keeps a GPU as busy as a
        larger one. Under ZeRO-3, which gathers all weights for each of them, it is UNTRIED_TOKENS.
        """
        enough = UNTRIED_TOKENS if self.stage == 3 else ENOUGH_TOKENS
        needed = max(self.longest, min(wanted, enough))
        return self.shape.activations is None or self.tokens(recomputed=False) < needed


def wanted_tokens(setup: Setup, layout: Layout, longest: int) -> int:
    """Tokens beyond which a run gains nothing from a larger micro-batch: those asked for, or all that a rank has.

    Args:
        setup: The run.
        layout: Of the micro-batches.
        longest: Tokens of the longest pair, of a rank's cut of it where rows are cut.
    """
    train, epochs = setup.config.train, setup.epochs
    tokens = num_tokens(setup.train_pairs.lengths, layout)
    steps = range(min(epochs.steps_per_epoch, LOOKED_AT))
    limits = [max(int(tokens[epochs.batch(step)].sum()) for step in steps) // setup.world.world_size]
    if train.tokens_per_micro_batch != "auto":
        limits.append(train.tokens_per_micro_batch)
    if train.micro_batch_size is not None:
        limits.append(train.micro_batch_size * longest)
    return min(limits)
