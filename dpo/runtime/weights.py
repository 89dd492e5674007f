"""Weights across ranks: named, gathered, mixed, restored.

Files of DeepSpeed are read `without_code` here and wherever else they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.errors import UserError, one_line
from dpo.runtime.distributed import from_main
from dpo.runtime.engine import deepspeed


@contextlib.contextmanager
def without_code(folder: Path) -> Iterator[None]:
    """Within it torch.load builds tensors, plain values and four classes of DeepSpeed, whatever its caller allows.

    DeepSpeed reads its files with weights_only=False, which runs what a pickle says.

    Args:
        folder: The checkpoint, for the message.
    Raises:
        UserError: If a file asks for anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    names = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None}
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ |= {name: value for name, value in names.items() if value is not None}
    try:
        with torch.serialization.safe_globals(known):
            yield
    except pickle.UnpicklingError as error:
        asked = one_line(error, 300)
        raise UserError(
            f"checkpoint {folder} holds more than tensors and is not loaded, it could run code: {asked}; delete the"
            f" folder if it is not yours"
        ) from None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


@torch.no_grad()
def mix_into(target: nn.Module, source: nn.Module, alpha: float) -> None:
    """target <- alpha source + (1 - alpha) target, weight by weight in fp32; collective under ZeRO-3.

    Args:
        target: Changed; its weights keep their dtype.
        source: With the same weights in the same order.
        alpha: In [0, 1].
    """
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        sharded = hasattr(old, "ds_id")
        with (
            deepspeed.zero.GatheredParameters([new], enabled=sharded),
            deepspeed.zero.GatheredParameters([old], modifier_rank=0, enabled=sharded),
        ):
            old.copy_(torch.lerp(old.float(), new.float(), alpha))


@torch.no_grad()
def set_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model the weights that `full_state` took; collective under ZeRO-3.

    Args:
        model: Of the same architecture.
        state: Name -> whole weight, tied ones once, the same on every rank.
    """
    for name, parameter in model.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            parameter.copy_(state[name])


@torch.no_grad()
def give_weights(engine: Any, model: nn.Module, source: nn.Module | None) -> None:
    """Weights for an engine that has not stepped, its fp32 masters included; collective.

    Args:
        engine: Of `start_training`.
        model: The transformers model within it.
        source: On rank 0 a model of the same architecture; None on the others.
    """
    given = {} if source is None else dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            if given:
                parameter.copy_(given[name])
            if not sharded:
                from_main(parameter)
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights as they are, names included; collective under ZeRO-3, the same on every rank."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def num_parameters(module: nn.Module, *, trained: bool = False) -> int:
    """Parameters of a module, or those of them that learn; whole ones, of which a rank may hold a shard."""
    counted = (p for p in module.parameters() if p.requires_grad or not trained)
    return sum(getattr(p, "ds_numel", p.numel()) for p in counted)


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
