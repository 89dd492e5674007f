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
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dpo.config import OptimConfig
from dpo.errors import UserError
from dpo.runtime.deepspeed_json import check_keys, check_owned, without_auto

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # noqa: E402  (reads DS_ACCELERATOR, and warns without it)
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError  # noqa: E402
from deepspeed.runtime.utils import combine_grad_norm_groups  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Outcome = Literal["applied", "overflow", "exhausted", "nonfinite"]
"""What became of a step: the weights changed; fp16's loss scale falls and they did not; it cannot fall any further; the
gradient is not finite. The same on every rank."""

_SECTIONS = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedFP16Config": "fp16", "DeepSpeedBF16Config": "bf16"}


def _check_sections(config: dict[str, Any], name: str) -> None:
    """Refuse what DeepSpeed's own config refuses, as it would at the start."""
    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (_SECTIONS.get(error.title, error.title), *first["loc"])))
        got = json.dumps(first["input"], default=str)
        raise UserError(f"{name}: {key} is {got}: {first['msg']}; fix or remove it") from None
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        # It looks into a section before it checks it: whatever its values are not, these are what comes out.
        raise UserError(f"{name}: DeepSpeed refuses it: {' '.join(str(error).split())}; fix or remove it") from None


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
    check_owned(config, optim, precision, global_batch_size, micro_batch_size, name)
    for key in ("optimizer", "scheduler", "train_batch_size"):
        config.pop(key, None)
    half: dict[str, Any] = {}
    if precision != "fp32":
        half[precision] = config.get(precision, {}) | {"enabled": True}
        half["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
        accumulated = half["data_types"]["grad_accum_dtype"]
        if not zero_stage(config) and (precision == "fp16" or accumulated != precision):
            what = "scaled as the loss was" if precision == "fp16" else f"accumulated in {accumulated}"
            why = f"zero_optimization.stage is 0 or missing, and {precision} gradients cannot be {what} there"
            raise UserError(f"{name}: {why}; use 1, 2 or 3")
    config |= half | {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves offloading too, without compiling an op
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}} | config.get("timers", {}),  # it waits for the device twice a step
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
        "steps_per_print": 2**31, "timers": config["timers"],
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


def exchanging_attention(attend: Any, config: Any, group: Any) -> Any:
    """Ulysses attention over rows that a group's ranks hold in cuts (Jacobs et al. 2023, arXiv:2309.14509).

    Args:
        attend: attend(module, query, key, value, mask, **kwargs) over whole rows, with this rank's share of the heads.
        config: Of the model.
        group: Process group of the ranks.
    Returns:
        A module called like `attend`, with the tensors of this rank's cut.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    text = config.get_text_config()
    heads = text.num_attention_heads
    # Not register_with_transformers: it sets module state of DeepSpeed that changes what engines average over.
    return UlyssesSPAttentionHF(
        attn=attend, batch_size=1, attn_head_count=heads,
        attn_head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        kv_head_count=getattr(text, "num_key_value_heads", None) or heads, num_hidden_layers=text.num_hidden_layers,
        process_group=group, seq_length_is_variable=True,
    )  # fmt: skip


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


def gradient_norm(engine: Any) -> Tensor | None:
    """Norm of the step's gradient before clipping, for the caller to read with what else it waits for; collective.

    Args:
        engine: After the step's last `backward`.
    Returns:
        Scalar on the device, times fp16's loss scale, infinite if the gradient is not finite. None where DeepSpeed has
        to find it (an offloaded optimizer, ZeRO-1 in bf16, no ZeRO), and where nobody wants it.
    """
    optimizer = engine.optimizer
    if any(getattr(optimizer, name, False) for name in ("cpu_offload", "offload_optimizer")):
        return None
    if hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
        return combine_grad_norm_groups(optimizer._get_norm_groups())
    return optimizer.scaled_global_norm() if getattr(optimizer, "compute_grad_norm", False) else None


@contextmanager
def _norm_is_known(optimizer: Any, norm: float | None) -> Iterator[None]:
    """Give DeepSpeed a norm that the host knows, where it would compute it and wait for it and its finiteness."""
    known = {} if norm is None else {
        "scaled_global_norm": lambda norm_type=2: torch.tensor(norm, dtype=torch.float32, device="cpu"),
        "_get_norm_groups": lambda: [torch.tensor(norm, dtype=torch.float64, device="cpu")],
        "check_overflow": lambda partition_gradients=True: None,  # a norm of what is not finite is not either
    }  # fmt: skip
    vars(optimizer).update(known)
    try:
        yield
    finally:
        for name in known:
            delattr(optimizer, name)


def step(engine: Any, lr: float, norm: float | None = None) -> tuple[float | None, Outcome]:
    """Take an optimizer step, unless the gradient is not finite; collective.

    Args:
        engine: After the step's last `backward`.
        lr: Learning rate of this step.
        norm: That of `gradient_norm`; None has DeepSpeed compute it and wait for it.
    Returns:
        Gradient norm before clipping, None where no step was taken or DeepSpeed was told not to compute it; and what
        became of the step.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if not hasattr(engine.optimizer, "overflow"):  # stage 0 in fp32: DeepSpeed would take whatever there is
        total = float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
        if not math.isfinite(total):
            engine.zero_grad()
            return None, "nonfinite"
        engine.step()
        return total, "applied"
    scale = engine.optimizer.loss_scale if engine.fp16_enabled() else None
    try:
        with _norm_is_known(engine.optimizer, norm):
            engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        return None, "exhausted"
    if not engine.was_step_applied():
        return None, _left_out(engine, scale)
    total_norm = engine.get_global_grad_norm()
    return None if total_norm is None else float(total_norm), "applied"


def _left_out(engine: Any, scale: float | None) -> Outcome:
    """Why DeepSpeed left a step out that began with a loss scale, None where there is none."""
    if scale is None or not engine.dynamic_loss_scale():
        return "nonfinite"
    return "exhausted" if scale <= engine.dynamic_loss_scale_args()["min_scale"] else "overflow"


def looks_at_gradient(config: dict[str, Any], precision: str) -> bool:
    """Whether an engine leaves out a step whose gradient is not finite, or has been told not to look."""
    switches = {"fp32": ("zero_optimization", "compute_grad_norm"), "bf16": ("bf16", "check_grad_overflow")}
    if precision not in switches or zero_stage(config) not in (1, 2):
        return True
    section, key = switches[precision]
    return bool(config.get(section, {}).get(key, True))
