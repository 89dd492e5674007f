"""Low-rank adapters (LoRA) inside a model whose own weights stay frozen; the only importer of peft.

    h = W x + scale B A x        A (r, in), B (out, r); B starts at zero, so that the start is the base model itself

Layers are replaced in place: the model stays a transformers model for everything else. The adapter in training is named
TRAINED. A run that continues an adapter holds a frozen copy of it, named REFERENCE; a new adapter needs none, since the
base without it is the reference. Hu et al. 2021, arXiv:2106.09685; DoRA arXiv:2402.09353; rsLoRA arXiv:2312.03732.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpo.config import LoraConfig
from dpo.errors import UserError, one_line

TRAINED, REFERENCE = "default", "reference"
CONFIG = "adapter_config.json"
ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names within the path of a linear layer that chooses experts."""


def is_adapter(path: str) -> bool:
    """Whether a path is the folder of an adapter, which holds no model of its own."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def base_of(path: str, revision: str | None = None) -> tuple[str, str | None]:
    """The model that a path stands for.

    Args:
        path: Hub id, folder of a model, or folder of an adapter.
        revision: Of a model on the hub.
    Returns:
        Hub id or folder with the whole weights, and its revision.
    Raises:
        UserError: If an adapter does not say what it was trained on.
    """
    if not is_adapter(path):
        return path, revision
    values = settings_of(path)
    if not values.get("base_model_name_or_path"):
        raise UserError(f"{path}: {CONFIG} names no base model; set base_model_name_or_path in it")
    base = values["base_model_name_or_path"]
    if base.startswith(("/", ".", "~")) and not Path(base).is_dir():
        raise UserError(f"{path}: its base {base} is no folder; put it there, or change it in {CONFIG}")
    return base, values.get("revision") or revision


def settings_of(path: str) -> dict[str, Any]:
    """What the folder of an adapter says of it; empty for anything else.

    Raises:
        UserError: If its config is not readable.
    """
    if not is_adapter(path):
        return {}
    try:
        return dict(json.loads((Path(path) / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path}: {CONFIG} is not valid; save the adapter again with peft") from None


def tokenizer_of(path: str) -> str:
    """Where a model's tokenizer is: beside an adapter, if it was saved there, else with the base."""
    return path if (Path(path) / "tokenizer_config.json").is_file() else base_of(path)[0]


def check_installed() -> None:
    """Refuse adapters where peft is missing.

    Raises:
        UserError: Saying what to install.
    """
    if find_spec("peft") is None:
        raise UserError("adapters (model.lora.r, or an adapter as model.policy) need peft; pip install peft")
    # Which peft imports, and which warns on a CPU of kernels that nothing here asks for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def linear_names(model: Any) -> list[str]:
    """All linear layers but the head and the routers of a mixture of experts: by last names, or whole ones if the last
    mean others too.

    Not peft's "all-linear", which takes in routers and experts that are kept in one tensor.
    """
    head = model.get_output_embeddings()
    whole = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not ROUTERS & set(name.split("."))
    }
    last = {name.rpartition(".")[2] for name in whole}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if meant == whole else whole)


def add(
    model: Any,
    lora: LoraConfig,
    *,
    seed: int,
    base: str,
    revision: str | None = None,
) -> None:
    """Freeze a model and put a new adapter into it.

    Args:
        model: A transformers model; under ZeRO-3 its weights are sharded already and the adapter's are not yet.
        lora: Rank, scale, targets and variants.
        seed: Of A's random values; the global random state is left as it was.
        base: Hub id or folder of the model, for those who load the adapter later.
        revision: Of `base` on the hub.
    Raises:
        UserError: If no layer has such a name, or the head is among them.
    """
    import peft

    names = [name for name, _ in model.named_modules()]
    unknown = [one for one in lora.targets if not any(name == one or name.endswith(f".{one}") for name in names)]
    if unknown:
        raise UserError(
            f"model.lora.targets has {', '.join(unknown)}: no layer is called so; the linear ones are"
            f" {', '.join(linear_names(model)[:12])}"
        )
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        target_modules=list(lora.targets) or linear_names(model),
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores W transposed
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        revision=revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model, TRAINED)
        except ValueError as error:
            reason = one_line(error, 200)
            named = list(lora.targets) or "(all linear layers)"
            raise UserError(f"model.lora.targets {named}: {reason}") from None
    _check_layers(model, "model.lora.targets")
    _train_only_adapter(model)


def take_up(model: Any, folder: str, place: str = TRAINED, *, name: str = "model.policy") -> None:
    """Freeze a model and put a saved adapter into it.

    Args:
        model: The adapter's base.
        folder: Of the adapter.
        place: TRAINED, or REFERENCE for the frozen copy beside it.
        name: Setting or flag that gives the folder, for errors.
    Raises:
        UserError: If the adapter is not one of low rank alone, or does not fit the model.
    """
    import peft

    kind = settings_of(folder).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{name} {folder}: adapter of type {kind}; only LORA can be trained")
    config: Any = peft.PeftConfig.from_pretrained(folder)
    if config.modules_to_save or config.bias != "none" or getattr(config, "trainable_token_indices", None):
        raise UserError(
            f"{name} {folder}: this adapter holds whole modules, biases or tokens beside LoRA; merge it into its"
            f" base with peft and train on the result"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are what is wanted
        peft.inject_adapter_in_model(config, model, place)
    _check_layers(model, f"{name} {folder}")
    stored = peft.utils.load_peft_weights(folder, device="cpu")
    own_names = {key.removeprefix("base_model.model."): value for key, value in stored.items()}
    try:
        found: Any = peft.set_peft_model_state_dict(model, own_names, place)
    except RuntimeError as error:
        raise UserError(f"{name} {folder}: does not fit its base: {' '.join(str(error).split())[:200]}") from None
    wrong = [key for key in found.missing_keys if f".{place}" in key] + list(found.unexpected_keys)
    if wrong:
        raise UserError(f"{name} {folder}: the adapter does not fit its base at {wrong[0]}")
    _train_only_adapter(model)


def _check_layers(model: Any, what: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(f"{what}: an adapter on the head; leave it out: log-probs are computed from its weight alone")
    if isinstance(model.get_input_embeddings(), BaseTunerLayer):
        raise UserError(f"{what}: an adapter on the embedding; leave it out")


def _train_only_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{TRAINED}" in name)
    model.eval()


def attached(model: Any) -> bool:
    """Whether a model holds an adapter."""
    return TRAINED in getattr(model, "peft_config", {})


def stored_parameters(path: str) -> int:
    """Parameters in the folder of an adapter; 0 for anything else."""
    if not is_adapter(path):
        return 0
    with safetensors.safe_open(Path(path) / "adapter_model.safetensors", framework="pt") as stored:
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())


def reference_view(model: Any) -> Callable[[], AbstractContextManager[None]]:
    """What shows the reference within a model that holds the policy.

    Args:
        model: With an adapter in training.
    Returns:
        view(): a block within which the model is the reference: the base with the frozen copy of the adapter, where
        there is one, else the base alone.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    has_copy = REFERENCE in model.peft_config

    @contextmanager
    def view() -> Iterator[None]:
        # Not peft's own enable_adapters and set_adapter: they switch requires_grad too, under DeepSpeed's hooks.
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [REFERENCE if has_copy else TRAINED], not has_copy
        try:
            yield
        finally:
            for layer in layers:
                layer._active_adapter, layer._disable_adapters = [TRAINED], False

    return view


def save(model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write the adapter in training as a folder that peft loads.

    Args:
        model: Gives its settings; its weights are not read, they may be sharded.
        state: Name in the model -> whole weight on the CPU, of the adapter at least.
        tokenizer: Of the model, chat template included.
        folder: Existing.
    """
    import peft

    config = copy.copy(model.peft_config[TRAINED])
    config.inference_mode = True
    # Embeddings are frozen; peft would ask the hub whether they have grown.
    stored = peft.get_peft_model_state_dict(model, state, TRAINED, save_embedding_layers=False)
    named = {f"base_model.model.{name}": value.contiguous() for name, value in stored.items()}
    # Not save_file, whose files only their owner may read.
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(named, metadata={"format": "pt"}))
    config.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)


def merge(model: Any) -> None:
    """Add the adapter in training to the weights beneath it and take its layers away: a plain model again.

    Args:
        model: In fp32, lest the sum be rounded more than once.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True, adapter_names=[TRAINED])
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
