"""The DeepSpeed engine: its config, its start, one optimizer step.

DeepSpeed owns memory and communication. Batch size, accumulation, clipping and precision have their owner in the
recipe: a JSON that sets one of them to another value is refused, "auto" means that the recipe decides.

A step may hold any number of micro-batches. DeepSpeed divides gradients by the number of ranks, so a micro-batch's loss
sum is scaled by world_size / (pairs of the step), and only the last micro-batch is an accumulation boundary: with
gradient_accumulation_steps 1 and no boundary set, all backward passes but the last would be dropped silently.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import os
import warnings
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.runtime.deepspeed_json import check_keys, without_auto

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # noqa: E402  (reads DS_ACCELERATOR, and warns without it)
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


_SECTIONS = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedFP16Config": "fp16", "DeepSpeedBF16Config": "bf16"}


def _check_sections(config: dict[str, Any], name: str) -> None:
    """Refuse what DeepSpeed's own config refuses, as it would at the start."""
    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (_SECTIONS.get(error.title, error.title), *first["loc"])))
        got = json.dumps(first["input"], default=str)
        raise UserError(f"{name}: {key} is {got}: {first['msg']}; mend or remove it") from None
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        # It looks into a section before it checks it: whatever its values are not, these are what comes out.
        raise UserError(f"{name}: DeepSpeed refuses it: {' '.join(str(error).split())}; mend or remove it") from None


def _check_owned(
    json_config: dict[str, Any],
    optim: OptimConfig,
    precision: str,
    global_batch_size: int,
    micro_batch_size: int | None,
    name: str,
) -> None:
    """Refuse a JSON that contradicts the recipe."""
    owned = {
        "train_batch_size": (global_batch_size, "train.global_batch_size"),
        "gradient_clipping": (optim.max_grad_norm, "optim.max_grad_norm"),
        "train_micro_batch_size_per_gpu": (micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (None, "train.global_batch_size and train.tokens_per_micro_batch"),
    }
    for key, (value, owner) in owned.items():
        if key in json_config and json_config[key] != value:
            raise UserError(f'{name}: {key} is {json_config[key]}; remove it or write "auto": it is set by {owner}')
    for key in ("fp16", "bf16"):
        enabled = json_config.get(key, {}).get("enabled")
        if enabled is not None and enabled != (precision == key):
            raise UserError(
                f'{name}: {key}.enabled is {str(enabled).lower()} but train.precision is {precision}; remove it or'
                f' write "auto"'
            )
    kind = json_config.get("optimizer", {}).get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        raise UserError(f"{name}: optimizer.type is {kind}; leave it out: it is AdamW, set by the optim section")
    for key in ("optimizer", "scheduler"):
        if json_config.get(key, {}).get("params"):
            raise UserError(f'{name}: {key}.params is set; remove it or write "auto": it is set by the optim section')


def build_config(
    json_config: dict[str, Any],
    *,
    optim: OptimConfig,
    precision: str,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    name: str = "--config",
) -> dict[str, Any]:
    """Merge the user's JSON with what the recipe owns.

    Args:
        json_config: As read; not changed.
        optim: For clipping.
        precision: fp16, bf16 or fp32.
        global_batch_size, micro_batch_size: Pairs per step and per forward pass, only to compare with.
        name: Of the JSON, for messages.
    Returns:
        A config for `deepspeed.initialize`.
    Raises:
        UserError: If the JSON sets a value that the recipe owns to something else, or an unknown ZeRO stage.
    """
    _quiet()  # loading weights for stage 3 is DeepSpeed's business already
    config = without_auto(json_config)
    check_keys(config, name)
    _check_owned(config, optim, precision, global_batch_size, micro_batch_size, name)
    for key in ("optimizer", "scheduler", "train_batch_size"):
        config.pop(key, None)
    half: dict[str, Any] = {}
    if precision != "fp32":
        half[precision] = config.get(precision, {}) | {"enabled": True}
        half["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
        if not zero_stage(config) and half["data_types"]["grad_accum_dtype"] != precision:
            raise UserError(
                f"{name}: zero_optimization.stage is 0 or missing, and {precision} gradients cannot be accumulated in"
                f" {half['data_types']['grad_accum_dtype']} there; use 1, 2 or 3"
            )
    config |= half | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves offloading too, without compiling an op
        "steps_per_print": 2**31,
    }
    _check_sections(config, name)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _quiet() -> None:
    """Keep DeepSpeed's own chatter out of the log, and its shared-memory op from compiling for a minute on a CPU."""
    deepspeed_logger.setLevel(logging.WARNING)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        # torch 2.13 warns of these two calls inside DeepSpeed 0.19 at every step.
        warnings.filterwarnings("ignore", message=f".torch.distributed.{name}. is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay acts on matrices, not on biases and norms."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    others = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def start_training(module: nn.Module, config: dict[str, Any], optim: OptimConfig) -> Any:
    """An engine that trains a module, with AdamW and fp32 master weights.

    Args:
        module: In eval mode; moved to this rank's device.
        config: As `build_config` gives.
        optim: AdamW's constants; the learning rate is set at every step.
    Returns:
        The DeepSpeed engine.
    """
    _quiet()
    groups = _parameter_groups(module, optim.weight_decay)
    if optim.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: Any = AdamW8bit(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    else:
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def frozen_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config under which a frozen module is loaded and sharded: it, and no cast later, decides the dtype."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": config["zero_optimization"],
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
    }


def start_frozen(module: nn.Module, config: dict[str, Any]) -> Any:
    """A stage-3 engine that shards a frozen module and never steps.

    A frozen module cannot be given to an engine of a lower stage, which has nothing to partition.

    Args:
        module: Loaded under `config`.
        config: As `frozen_config` gives.
    """
    engine, *_ = deepspeed.initialize(model=module.requires_grad_(False), config=config)
    engine.eval()
    return engine


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds a module's weights in parts."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def stop(engine: Any) -> None:
    """Give back all memory of an engine: weights, their shards, optimizer states.

    `destroy` alone leaves them reachable from hooks; under ZeRO-3 even the garbage collector does not find them.
    """
    parameters = list(engine.module.parameters())
    engine.destroy()
    for holder in (engine.optimizer, engine):
        vars(holder).clear()
    for parameter in parameters:
        parameter.grad = None
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
    parameters.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def backward(engine: Any, loss: Tensor, is_last: bool) -> None:
    """Accumulate the gradient of one micro-batch.

    Args:
        engine: Of `start_training`.
        loss: Scalar: sum over the micro-batch * world_size / (pairs of the step).
        is_last: Whether the step's gradients are complete with it.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss, scale_wrt_gas=False)


def step(engine: Any, lr: float) -> float | None:
    """Take an optimizer step.

    Args:
        engine: After the step's last `backward`.
        lr: Learning rate of this step.
    Returns:
        Gradient norm before clipping; None where DeepSpeed left the step out, or was told not to compute it.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.step()
    if not engine.was_step_applied():
        return None
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def has_stepped(engine: Any) -> bool:
    """Whether the last `step` changed the weights: DeepSpeed leaves one out whose gradient is not finite."""
    return bool(engine.was_step_applied())


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights as they are, names included; collective under ZeRO-3, the same on every rank."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def full_state(model: nn.Module, dtype: torch.dtype, keep: bool, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Whole weights of a model, gathered one at a time; collective under ZeRO-3.

    Args:
        model: The transformers model, within an engine or not.
        dtype: Of the copies of floating-point weights.
        keep: Whether this rank keeps them; the others only take part.
        trained_only: Leave out what is frozen, and buffers.
    Returns:
        Name -> tensor on the CPU, empty unless `keep`. Tied weights share one tensor.
    """
    copies: dict[int, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if keep:
                if id(tensor) not in copies:
                    value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
                    copies[id(tensor)] = value.contiguous()
                result[name] = copies[id(tensor)]
    return result
