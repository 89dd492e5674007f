"""The DeepSpeed JSON as the user writes it: read, and refused key by key where DeepSpeed would stumble or pass over it.

DeepSpeed takes an unknown key without a word and a wrong type with a traceback at the start; here both are one line
before anything is loaded. What DeepSpeed's own models know of a section's values is left to them (`engine.py`).
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from pathlib import Path
from typing import Any

from dpo.config import OptimConfig
from dpo.data.files import without_doubles
from dpo.errors import UserError

DEFAULT_JSON = {
    "zero_optimization": {
        "stage": 2, "overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True,
        "use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000,
    }
}  # fmt: skip
"""The content of ds_configs/zero2.json."""
DTYPES = ("fp16", "bf16", "fp32")
KEYS: dict[str, type | tuple[type, ...]] = {
    "zero_optimization": dict, "fp16": dict, "bf16": dict, "data_types": dict, "optimizer": dict, "scheduler": dict,
    "aio": dict, "checkpoint": dict, "comms_logger": dict, "flops_profiler": dict, "timers": dict,
    "train_batch_size": int, "train_micro_batch_size_per_gpu": int, "gradient_accumulation_steps": int,
    "gradient_clipping": (int, float), "gradient_predivide_factor": (int, float), "steps_per_print": int,
    "communication_data_type": str, "prescale_gradients": bool, "sparse_gradients": bool, "disable_allgather": bool,
    "wall_clock_breakdown": bool, "memory_breakdown": bool, "dump_state": bool, "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
}  # fmt: skip
"""Top-level keys that mean something in a run of this program, and what they hold."""
ELSEWHERE = {
    "activation_checkpointing": "model.gradient_checkpointing", "amp": "train.precision",
    "torch_autocast": "train.precision", "tensorboard": "log.backends", "wandb": "log.backends",
    "comet": "log.backends", "csv_monitor": "log.backends",
}  # fmt: skip
"""Keys of DeepSpeed's that would do nothing here, or the same thing twice -> the setting that does it."""
_WORDS = {
    dict: "an object", int: "a whole number", (int, float): "a number", str: "a string", bool: "true or false"
}  # fmt: skip


def read_json(path: str | None) -> dict[str, Any]:
    """The DeepSpeed JSON of a run.

    Args:
        path: File given by --config; None for `DEFAULT_JSON`.
    Returns:
        Its content, "auto" and all.
    Raises:
        UserError: If the file is missing, no JSON object, or gives a key twice.
    """
    if path is None:
        return copy.deepcopy(DEFAULT_JSON)
    if not os.path.isfile(path):
        raise UserError(f"--config {path}: no such file; the ones that come with the project are in ds_configs/")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=without_doubles)
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, bad JSON and endless numbers are ValueErrors
        raise UserError(f"--config {path}: not valid JSON: {error}; fix it") from None
    if not isinstance(content, dict):
        kind, example = type(content).__name__, '{"zero_optimization": {"stage": 2}}'
        raise UserError(f"--config {path}: expected a JSON object, got {kind}; write one such as {example}")
    return content


def without_auto(value: Any) -> Any:
    """The same without the values "auto", by which the recipe decides."""
    if isinstance(value, dict):
        return {key: without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def check_keys(config: dict[str, Any], name: str) -> None:
    """Refuse unknown top-level keys and values of another type.

    Args:
        config: Without "auto".
        name: Of the JSON, for messages.
    Raises:
        UserError: Names the key and what it may be.
    """
    for key, value in config.items():
        if key in ELSEWHERE:
            raise UserError(f"{name}: {key} has no effect here; remove it and use {ELSEWHERE[key]}")
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"remove it; known here are {', '.join(KEYS)}"
            raise UserError(f"{name}: unknown key {key[:200]}; {hint}")
        wanted = KEYS[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise UserError(f"{name}: {key} is {json.dumps(value)}; it must be {_WORDS[wanted]}, or leave it out")
    _check_zero(config.get("zero_optimization", {}), name)
    for key, value in config.get("data_types", {}).items():
        if key.endswith("dtype") and value not in DTYPES:
            raise UserError(f"{name}: data_types.{key} is {json.dumps(value)}; use {' or '.join(DTYPES)}")


def _check_zero(zero: dict[str, Any], name: str) -> None:
    """What DeepSpeed asserts only when the engine starts."""
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{name}: zero_optimization.stage is {json.dumps(stage)}; use 1, 2 or 3")
    bucket = zero.get("allgather_bucket_size", 0)
    if isinstance(bucket, int | float) and bucket % 2:
        raise UserError(f"{name}: zero_optimization.allgather_bucket_size is {bucket}; use an even number")
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key)
        if isinstance(part, dict) and part.get("device") == "nvme" and not part.get("nvme_path"):
            raise UserError(f"{name}: zero_optimization.{key} is on nvme without a path; name a folder by nvme_path")


def check_owned(
    json_config: dict[str, Any],
    optim: OptimConfig,
    precision: str,
    global_batch_size: int,
    micro_batch_size: int | None,
    name: str,
) -> None:
    """Refuse a JSON that contradicts the recipe.

    Args:
        json_config: Its content.
        optim, precision, global_batch_size, micro_batch_size: The recipe's.
        name: Of the JSON, for messages.
    Raises:
        UserError: If a value that the recipe owns is set to something else.
    """
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
