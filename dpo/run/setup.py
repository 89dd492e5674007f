"""A run validated as a whole, its data tokenised, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo.config import Config
from dpo.data.epochs import Epochs
from dpo.data.loader import Loader, with_fixed_rows
from dpo.data.mixture import Pairs
from dpo.data.planner import Costs, Layout, num_tokens
from dpo.objective.tokens import weigher
from dpo.run import roles
from dpo.run.data import RunData
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import World
from dpo.types import PreferenceRow, TokenizedPair

LOOKED_AT = 32
"""Heaviest steps whose micro-batches decide the length of fixed rows, the trial of memory, and how much room it needs;
and first steps that show what is usual."""
UNTRIED_TOKENS = 16384
"""Tokens a micro-batch on a GPU, where nothing has been tried."""
TAIL_AT_MOST = 0.1
"""Share of dummy tokens above which train.static_shapes auto leaves rows as they are."""


@dataclass(frozen=True)
class Setup:
    """A validated run, before any model is loaded.

    Attributes:
        config: Settings as given.
        world: This rank.
        engine_config: For DeepSpeed.
        precision: fp16, bf16 or fp32, resolved.
        tokenizer: Of the policy.
        data: Its sources, tokenised.
        train_pairs, validation_pairs: All their pairs; None where there is no validation.
        start_dtype: Dtype of the policy's stored weights.
        notes: Lines for the log: what was decided, and why.
        costs: By which the ranks get equal work.
        token_budget: Tokens per micro-batch of training that fit; None before that is known.
        evaluation_budget: The same where there is no gradient.
    """

    config: Config
    world: World
    engine_config: dict[str, Any]
    precision: str
    tokenizer: Any
    data: RunData
    train_pairs: Pairs
    validation_pairs: Pairs | None
    start_dtype: torch.dtype
    notes: tuple[str, ...]
    costs: Costs = Costs()
    token_budget: int | None = None
    evaluation_budget: int | None = None

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.config.train.output_dir)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the policy."""
        return deepspeed_engine.DTYPES[self.precision]

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's section zero_optimization."""
        return self.engine_config.get("zero_optimization", {})

    @property
    def zero_stage(self) -> int:
        """ZeRO stage."""
        return deepspeed_engine.zero_stage(self.engine_config)

    @property
    def ranks_a_row(self) -> int:
        """Ranks that compute a row together, each a cut of it."""
        return self.config.train.sequence_parallel_size

    @property
    def trains_adapters(self) -> bool:
        """Whether low-rank adapters are trained and all other weights stay as they are."""
        return roles.trains_adapters(self.config)

    @property
    def reference_mode(self) -> str:
        """online, cached, adapter or none: reference.mode resolved."""
        return roles.reference_mode(self.config)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt + completion that will be scored."""
        sets = [pairs for pairs in (self.train_pairs, self.validation_pairs) if pairs is not None]
        return max(int((pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)).max()) for pairs in sets)

    @property
    def loss_in_forward(self) -> bool:
        """Whether the gradient of the loss is taken in the forward pass of the head."""
        wanted = self.config.model.loss_in_forward
        if self.ranks_a_row > 1:
            return False  # no rank knows the sum of a completion before its tile is gone
        return self.world.device.type == "cuda" if wanted == "auto" else wanted

    @property
    def epochs(self) -> Epochs:
        """Which pairs make which step of DPO."""
        train = self.config.train
        shuffle, parts = self.config.data.shuffle, self.data.parts()
        return Epochs(len(self.train_pairs), train.global_batch_size, train.seed, shuffle, parts)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of DPO."""
        steps = self.config.train.epochs * self.epochs.steps_per_epoch
        limit = self.config.train.max_steps
        return steps if limit is None else min(steps, limit)

    def longest_row(self, layout: Layout) -> int:
        """Tokens that a rank holds of the longest training pair."""
        return math.ceil(int(num_tokens(self.train_pairs.lengths, layout).max()) / self.ranks_a_row)

    def heaviest_steps(self, layout: Layout) -> list[int]:
        """The steps with the most tokens among all that one pass over the data, or more, makes."""
        steps = max(self.total_steps, self.epochs.steps_per_epoch)
        return list(_heaviest_steps(self.train_pairs, self.epochs, layout, steps))

    def sample_pairs(self) -> list[TokenizedPair]:
        """Pairs whose prompts are answered: the first of every validation set in turn, of training where is none."""
        pairs, sets = self.validation_pairs, list(self.data.validation_sets().values())
        if pairs is None:
            pairs, sets = self.train_pairs, [range(len(self.train_pairs))]
        in_turn = (ids[i] for i in range(self.config.log.samples) for ids in sets if i < len(ids))
        return [pairs[i] for i in islice(in_turn, self.config.log.samples)]

    def texts(self, pairs: Pairs, pair_id: int) -> PreferenceRow:
        """A pair as the data has it; read off its ids, which may have been cut, where texts are not kept."""
        if (row := pairs.texts(pair_id)) is not None:
            return row
        pair = pairs[pair_id]
        prompt, chosen, rejected = (
            self.tokenizer.decode(ids.tolist()) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        )
        return PreferenceRow(prompt, chosen, rejected, int(pairs.row_numbers[pair_id]))

    def name_rows(self, pair_ids: Sequence[int]) -> str:
        """Say which rows of the training data some pairs are."""
        sources = self.config.data.train_sources
        if len(sources) > 1:
            return ", ".join(map(self.train_pairs.origin, pair_ids))
        rows = sorted({int(self.train_pairs.row_numbers[i]) for i in pair_ids})
        return f"rows {', '.join(map(str, rows))} of {sources[0].path}"

    def sample_prompts(self) -> list[list[int]]:
        """Token ids of their prompts."""
        return [pair.prompt_ids.tolist() for pair in self.sample_pairs()]

    def loader(self, pairs: Pairs, layout: Layout) -> Loader:
        """This rank's micro-batches over a data set, in the order of the run's epochs."""
        train = self.config.train
        found = self.token_budget if pairs is self.train_pairs else self.evaluation_budget
        budget = found or train.tokens_per_micro_batch
        if budget == "auto":
            budget = UNTRIED_TOKENS if self.world.device.type == "cuda" else 4096
        group = self.ranks_a_row  # its ranks get the same rows and hold a cut of each
        loss = self.config.loss
        weighs_tokens = layout not in ("chosen", "padded_chosen")  # SFT does not
        loader = Loader(
            pairs, self.epochs, self.world.rank // group, self.world.world_size // group, layout,
            budget * group, train.micro_batch_size,
            pin_memory=self.world.device.type == "cuda",
            token_weights=weigher("sampo" in loss.names, loss.ld_alpha, train.seed) if weighs_tokens else None,
            costs=self.costs,
        )
        must = self.config.model.compile or train.static_shapes is True
        may = self.world.device.type == "cuda" and train.static_shapes == "auto"
        if not (must or may) or layout.startswith("padded"):
            return loader
        heaviest = usual = [np.arange(len(pairs))]
        if pairs is self.train_pairs:
            heaviest = [self.epochs.batch(step) for step in self.heaviest_steps(layout)]
            usual = [self.epochs.batch(step) for step in range(min(self.epochs.steps_per_epoch, LOOKED_AT))]
        fixed, tail = with_fixed_rows(loader, heaviest, usual)
        return fixed if must or tail <= TAIL_AT_MOST else loader


@lru_cache(maxsize=4)
def _heaviest_steps(pairs: Pairs, epochs: Epochs, layout: Layout, steps: int) -> tuple[int, ...]:
    return tuple(epochs.heaviest(num_tokens(pairs.lengths, layout), steps, LOOKED_AT))
