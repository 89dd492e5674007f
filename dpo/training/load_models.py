"""The models that a run starts from: weights from wherever they are, adapters in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dpo.errors import UserError
from dpo.model import adapters, load, products
from dpo.run.setup import Setup
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import give_up, together


def load_weights(
    setup: Setup, path: str, dtype: torch.dtype, engine_config: dict[str, Any], *, policy: bool = False
) -> Any:
    """Load a model, with the adapter that `path` may name; collective.

    Args:
        setup: The run.
        path: Hub id, folder of a model or of an adapter, or builtin:tiny.
        dtype: Of the weights.
        engine_config: Under stage 3 the weights arrive sharded.
        policy: Whether it is the policy, whose frozen weights may be wanted in 4 bits.
    Raises:
        UserError: If it cannot be loaded.
    """
    model = setup.config.model
    sharded = deepspeed_engine.zero_stage(engine_config) == 3
    base, revision = adapters.base_of(path, setup.config.revision_of(path, is_policy=policy))
    name = "reference.path" if not policy and path == setup.config.reference.path else "model.policy"
    # Before anybody waits for the others in a collective of the device: a download may take long.
    together(lambda: load.fetch_weights(base, revision=revision, name=name))

    def read() -> Any:
        try:
            return load.load_model(
                base, dtype=dtype, seed=setup.config.train.seed, trust_remote_code=model.trust_remote_code,
                revision=revision, zero3_config=engine_config if sharded else None,
                four_bit_on=setup.world.device if policy and model.load_in_4bit else None, name=name,
            )
        except UserError as error:
            if sharded:  # rank 0 alone reads the values, and the others may wait for it in a collective of the device
                give_up(setup.world, str(error))
            raise

    loaded = together(read)
    if setup.world.device.type == "cpu":
        products.widen(loaded)  # and no adapter: policy and reference get theirs at different times
    if adapters.is_adapter(path):
        together(lambda: adapters.take_up(loaded, path, name=name))
    return loaded


def read_whole(setup: Setup, folder: Path) -> Any:
    """A model that the run wrote, in the dtype of training; on the rank that calls.

    Raises:
        UserError: If it cannot be loaded.
    """
    trust = setup.config.model.trust_remote_code
    return load.load_model(str(folder), dtype=setup.dtype, seed=setup.config.train.seed, trust_remote_code=trust)


def add_adapter(setup: Setup, path: str, model: Any) -> None:
    """Put a new adapter into a policy that was loaded from `path` and has none; collective.

    Raises:
        UserError: If model.lora.targets do not fit the model.
    """
    seed, settings = setup.config.train.seed, setup.config.model
    together(lambda: adapters.add(model, settings.lora, seed=seed, base=path, revision=settings.revision))
