"""Which weights a run trains and what its reference is, told from the settings."""

from __future__ import annotations

import torch

from dpo.config import Config
from dpo.model import adapters
from dpo.runtime import engine as deepspeed_engine


def trains_adapters(config: Config) -> bool:
    """Whether a run trains low-rank adapters: new ones, or those of the folder that model.policy names."""
    return config.model.lora.r > 0 or adapters.is_adapter(config.model.policy or "")


def reference_mode(config: Config) -> str:
    """reference.mode, where auto is adapter if adapters are trained and no other model is the reference; none where the
    loss needs no reference."""
    wanted = config.reference
    if not config.needs_reference:
        return "none"
    if wanted.mode != "auto":
        return wanted.mode
    return "adapter" if trains_adapters(config) and wanted.path is None else "online"


def reference_dtype(
    wanted: str, policy_dtype: torch.dtype, device: torch.device, *, sharded: bool, mode: str
) -> tuple[torch.dtype, str]:
    """The reference's dtype and why."""
    if wanted not in ("auto", "policy"):
        return deepspeed_engine.DTYPES[wanted], "reference.dtype"
    if mode == "adapter":
        return policy_dtype, "the frozen weights beneath the adapters: no second copy"
    if wanted == "policy" or sharded or mode == "cached":
        why = " under ZeRO-3" if sharded else ": the policy scores before its first step" if mode == "cached" else ""
        return policy_dtype, f"the policy's dtype{why}"
    if device.type == "cuda":
        return torch.float16, "half the memory, and log-probs closer than bf16"
    return policy_dtype, "the policy's dtype: half precision products are slow on a CPU"


def has_own_weights(config: Config, dtype: torch.dtype, policy_dtype: torch.dtype) -> bool:
    """Whether the reference is loaded beside the policy, which before its first step can be scored in its place."""
    mode = reference_mode(config)
    return mode == "online" or (mode == "cached" and (dtype != policy_dtype or config.reference.path is not None))
