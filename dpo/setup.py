"""A run validated as a whole, its data tokenised, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo import checks, roles
from dpo.config import Config, check_world_size
from dpo.data.chat import read_chat_template
from dpo.data.epochs import Epochs
from dpo.data.loader import Loader, with_fixed_rows
from dpo.data.mixture import Mixture, Pairs
from dpo.data.planner import Costs, Layout, num_tokens
from dpo.errors import UserError
from dpo.estimate import costs_of
from dpo.model import adapters, load, products
from dpo.model.shape import shape_of
from dpo.objective.catalog import beta_note
from dpo.objective.tokens import weigher
from dpo.run_data import RunData, prepare_data
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.deepspeed_json import read_json
from dpo.runtime.distributed import World, gather, together
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
        if self.config.train.sequence_parallel_size > 1:
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
        if isinstance(self.train_pairs, Mixture):
            return ", ".join(self.train_pairs.origin(i) for i in pair_ids)
        rows = sorted({int(self.train_pairs.row_numbers[i]) for i in pair_ids})
        return f"rows {', '.join(map(str, rows))} of {self.config.data.train_sources[0].path}"

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
        of_row = train.sequence_parallel_size  # ranks of a group get the same rows and hold a cut of each
        loss = self.config.loss
        weighs_tokens = layout not in ("chosen", "padded_chosen")  # SFT does not
        loader = Loader(
            pairs, self.epochs, self.world.rank // of_row, self.world.world_size // of_row, layout,
            budget * of_row, train.micro_batch_size,
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


def resolve_precision(wanted: str, device: torch.device) -> str:
    """The policy's precision: bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    if wanted != "auto":
        if wanted == "fp16" and device.type == "cpu":
            raise UserError("train.precision is fp16 on a CPU, where DeepSpeed refuses it; use bf16 or fp32")
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _precision_notes(precision: str, device: torch.device) -> list[str]:
    """Say how a CPU computes bf16; without instructions for it a run looks as if it hung."""
    if device.type != "cpu" or precision != "bf16":
        return []
    if products.fp32_is_faster():
        return ["products: operands in bf16, multiplied in fp32, which is faster on this CPU"]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    return ["train.precision is bf16 and this CPU has no instructions for it: many times slower than fp32"]


def _costs(config: Config, model_config: Any, world_size: int) -> Costs:
    """What a pair costs under the model; tokens alone where nothing is spread or the model cannot be counted."""
    if world_size == 1:
        return Costs()
    try:
        shape = shape_of(model_config, torch.bfloat16, trust_remote_code=config.model.trust_remote_code)
    except Exception:  # any architecture's own code runs here, and only even work is lost
        return Costs()
    return costs_of(**shape.sizes)


def model_and_tokenizer(config: Config) -> tuple[Any, Any]:
    """The policy's config and its tokenizer, as a run reads them.

    Raises:
        UserError: If there are none, or they do not fit each other.
    """
    model, trust = config.model, config.model.trust_remote_code
    assert model.policy is not None
    base, revision = adapters.base_of(model.policy, model.revision)
    model_config = load.load_config(base, revision=revision, trust_remote_code=trust)
    tokenizer = load.load_tokenizer(
        model.tokenizer or adapters.tokenizer_of(model.policy),
        revision=revision if model.tokenizer is None else model.tokenizer_revision,
        trust_remote_code=trust,
    )
    if model.chat_template is not None:
        tokenizer.chat_template = read_chat_template(model.chat_template)  # final/ takes it along
    vocabulary = model_config.get_text_config().vocab_size
    if not checks.reads(vocabulary, tokenizer):
        raise UserError(
            f"model.tokenizer has {len(tokenizer)} tokens, the policy {vocabulary}; use the policy's own tokenizer"
        )
    return model_config, tokenizer


def prepare(config: Config, world: World, deepspeed_json: str | None, *, for_elsewhere: bool = False) -> Setup:
    """Validate the whole run and tokenise its data; collective.

    Args:
        config: Settings.
        world: This rank.
        deepspeed_json: Path given by --config.
        for_elsewhere: The run itself will be on another machine, so that this one's device does not matter.
    Returns:
        The setup; nothing has been written but the cache of tokenised data.
    Raises:
        UserError: The same line on every rank.
    """

    def work() -> Setup:
        check_world_size(config, world.world_size)
        checks.check_backends(config)
        wanted = config.train.precision
        precision = wanted if for_elsewhere and wanted != "auto" else resolve_precision(wanted, world.device)
        engine_config = deepspeed_engine.build_config(
            read_json(deepspeed_json),
            optim=config.optim,
            precision=precision,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            name=deepspeed_json or "--config",
        )
        checks.check_engine(config, engine_config, precision)
        zero = engine_config.get("zero_optimization", {})
        checks.check_settings(config, zero, for_elsewhere=for_elsewhere)
        model_config, tokenizer = model_and_tokenizer(config)
        checks.check_sequence(config, model_config)
        if not for_elsewhere:
            for name, path in (("model.policy", config.model.policy), ("reference.path", config.reference.path)):
                if path is not None:
                    load.check_weights(path, name)  # of the adapter, where it is one
                    load.check_weights(adapters.base_of(path)[0], name)
        longest = checks.max_length(config, model_config)
        checks.check_reference_path(config, tokenizer, longest)
        data = prepare_data(config, tokenizer, longest)
        made = Setup(
            config=config, world=world, engine_config=engine_config, precision=precision, tokenizer=tokenizer,
            data=data, train_pairs=data.train_pairs(), validation_pairs=data.validation_pairs(),
            start_dtype=load.starting_dtype(model_config),
            notes=(
                *data.notes, *_precision_notes(precision, world.device),
                *filter(None, [beta_note(config.loss.names, config.loss.beta)]),
            ),
            costs=_costs(config, model_config, world.world_size),
        )
        checks.check_ids(tokenizer, model_config.get_text_config().vocab_size, made.train_pairs, made.validation_pairs)
        return made

    setup = together(work)
    if len(set(gather((setup.train_pairs.key, setup.precision, setup.costs)))) > 1:
        raise UserError("the ranks do not see the same data, model or kind of device: use a shared folder, equal nodes")
    return setup
