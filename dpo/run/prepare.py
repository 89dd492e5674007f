"""Settings -> a run validated as a whole, its data tokenised, before any weight is loaded."""

from __future__ import annotations

from typing import Any

import torch

from dpo.config import Config, check_world_size
from dpo.data.chat import read_chat_template
from dpo.data.planner import Costs
from dpo.errors import UserError
from dpo.estimate import costs_of
from dpo.model import adapters, load, products
from dpo.model.shape import shape_of
from dpo.objective.catalog import beta_note
from dpo.run import checks
from dpo.run.data import prepare_data
from dpo.run.setup import Setup
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.deepspeed_json import read_json
from dpo.runtime.distributed import World, gather, together


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


def _batch_notes(batch_size: int, num_pairs: int) -> list[str]:
    """Say that an epoch is one step of fewer pairs than were asked for; its learning rate is that of the warm-up."""
    if batch_size <= num_pairs:
        return []
    return [f"train.global_batch_size is {batch_size:,} and there are {num_pairs:,} training pairs: one step an epoch"]


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
        train_pairs = data.train_pairs()
        made = Setup(
            config=config, world=world, engine_config=engine_config, precision=precision, tokenizer=tokenizer,
            data=data, train_pairs=train_pairs, validation_pairs=data.validation_pairs(),
            start_dtype=load.starting_dtype(model_config),
            notes=(
                *data.notes, *_precision_notes(precision, world.device),
                *_batch_notes(config.train.global_batch_size, len(train_pairs)),
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
