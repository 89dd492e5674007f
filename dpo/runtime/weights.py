"""Weights across ranks and files: mixed, restored, put together from a checkpoint without an engine."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo.errors import UserError
from dpo.runtime.engine import deepspeed


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


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """Trained weights of a checkpoint, put together from the files of all its ranks; needs no engine.

    Args:
        folder: As `checkpoint.save` wrote it, under ZeRO 1, 2 or 3.
    Returns:
        Name within the engine's module -> fp32 master weight on the CPU; frozen weights are not there.
    Raises:
        UserError: If the files are not those of such a checkpoint.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            return get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {' '.join(str(error).split())[:200]}") from None
