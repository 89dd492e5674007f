"""Model and tokenizer from a hub id, a folder, or the built-in example; the only loader of weights.

Policy and reference are compared token by token, so both run without dropout: modules stay in eval mode. Weights are
memory-mapped by safetensors, so the ranks of a node share one copy of the file in memory.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils.logging import disable_progress_bar

from dpo.data.chat import end_ids, listed
from dpo.errors import UserError, one_line
from dpo.model import example
from dpo.model.blocks import fuse_gelu

BUILTIN = "builtin:tiny"
TOKENIZERS = ("*token*", "vocab*", "*.model", "tekken*", "*.tiktoken")
"""Files that a tokenizer is in."""


def _explain(what: str, path: str, error: Exception, *, sharded: bool = False) -> UserError:
    text = one_line(error) or type(error).__name__
    if "trust_remote_code" in text:
        return UserError(
            f"{what} {path}: brings code of its own, which is not run unasked; read it, pin it by model.revision, and"
            f" give --model.trust_remote_code true"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(f"{what} {path}: does not fit: {text[:200]}; use more GPUs, or offload (ds_configs/)")
    if Path(path).exists():
        where = "the folder, or name another" if not sharded else "zero_optimization in --config, or the folder"
        return UserError(f"{what} {path}: cannot be loaded: {text[:300]}; fix {where}")
    if path.startswith((".", "/", "~")):
        return UserError(f"{what} {path}: no such folder")
    return UserError(
        f"{what} {path}: neither a folder nor reachable on the hub; without network run once with --prepare_only where"
        f" there is one and share HF_HOME, or give a local folder ({text[:200]})"
    )


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, name: str = "tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `name` is what names it in a message.

    Raises:
        UserError: If there is none.
    """
    if path == BUILTIN:
        return example.build_tokenizer()
    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(kind)) for kind in TOKENIZERS):  # else one without words may load
        raise UserError(f"{name} {path}: the folder holds no tokenizer; put one there, or name it by model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer("a")  # a damaged one may load, and fail here
        return tokenizer
    except Exception as error:  # tokenizers raises no narrower class for a broken file
        raise _explain(name, path, error) from None


def load_config(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, name: str = "model.policy"
) -> Any:
    """The architecture of a model without its weights.

    Raises:
        UserError: If there is none, or it is no causal language model.
    """
    if path == BUILTIN:
        return example.build_model(0).config
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture's own code reads the values, and checks few of them
        raise _explain(name, path, error) from None


def fetch_weights(path: str, *, revision: str | None = None, name: str = "model.policy") -> Path | None:
    """Download a hub model's weights into the cache, without loading them; nothing to do for folders.

    Returns:
        Where they are; None for the built-in model.
    Raises:
        UserError: If the hub cannot be reached.
    """
    if path == BUILTIN or Path(path).is_dir():
        return None if path == BUILTIN else Path(path)
    try:
        kinds = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py"]
        # The same weights once more, in another form or beside a subfolder's model.
        others = ["consolidated*", "*/*.safetensors"]
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=kinds, ignore_patterns=others))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(path, revision=revision, allow_patterns=["*.bin"])
        return folder
    except (OSError, ValueError) as error:
        raise _explain(name, path, error) from None


def check_weights(path: str, name: str = "model.policy") -> None:
    """Refuse a local folder whose weights cannot be read, before a run begins; reads names and shapes alone.

    A pickle is unpickled as plain tensors and nothing else, here and later.

    Raises:
        UserError: There are none, or a file is damaged or holds something other than tensors.
    """
    folder = Path(path)
    if path == BUILTIN or not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*model*.bin"))
    if not files:
        raise UserError(f"{name} {path}: no weights there; name a folder with .safetensors or pytorch_model.bin")
    for file in files:
        try:
            load_state_dict(str(file), map_location="meta")
        except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
            text = one_line(error, 200)
            raise UserError(f"{file}: no readable weights: {text}; download or save them anew") from None


def context_length(config: Any) -> int | None:
    """Longest sequence a model takes, in tokens; None if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def starting_dtype(config: Any) -> torch.dtype:
    """Dtype of a model's stored weights; fp32 where its config does not say."""
    return config.dtype or torch.float32


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    zero3_config: dict[str, Any] | None = None,
    four_bit_on: torch.device | None = None,
    name: str = "model.policy",
) -> Any:
    """A causal language model in eval mode, on the CPU unless it is held in 4 bits.

    Args:
        path: Hub id, folder, or builtin:tiny.
        dtype: Of the weights.
        seed: Of the built-in model's initialisation.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model.
        zero3_config: DeepSpeed config with stage 3: the weights arrive partitioned, no rank holds the whole model.
        four_bit_on: Device on which the weights of all linear layers but the head are to be held in 4 bits.
        name: Setting or flag that gives the path, for errors.
    Returns:
        The transformers model; its dropout never acts.
    Raises:
        UserError: If the model cannot be loaded.
    """
    disable_progress_bar()  # a bar per rank says nothing that our own log does not
    if path == BUILTIN:
        return cast_parameters(example.build_model(seed), dtype).eval()
    # transformers keeps only a weak reference to this object and shards while it lives.
    sharded = HfDeepSpeedConfig(zero3_config) if zero3_config is not None else None
    quantized = {} if four_bit_on is None else _four_bits(dtype, four_bit_on)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, **quantized
        )
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise _explain(name, path, error, sharded=sharded is not None) from None
    finally:
        del sharded
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 on a CPU with bf16 repacks weights for inference in mid-run, scales rounded to bf16.
            module.support_avx512bf16_for_cpu = False
    fuse_gelu(model)
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} {path}: {type(model).__name__} has no output embedding; use a causal LM")
    return model.eval()


def _four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """4-bit NormalFloat, its scales quantised again; products in `dtype` (QLoRA, arXiv:2305.14314)."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a loaded model that never learns: the reference.

    Args:
        model: The policy before its first step.
        dtype: Of the copy's weights.
    Returns:
        The copy, on the same device, in eval mode, without gradients.
    """
    return cast_parameters(copy.deepcopy(model).eval().requires_grad_(False), dtype)


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Change the dtype of a model's weights in place; buffers keep theirs, since rotary frequencies need fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def save_folder(model: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, tokenizer: Any, folder: Path) -> None:
    """Write a model as a Hugging Face folder: safetensors of at most 5 GB, configs, tokenizer.

    Args:
        model: Gives architecture and generation config; its own weights are not read, they may be sharded.
        state: Whole weights on the CPU, tied ones sharing a tensor.
        dtype: Of the floating-point weights in `state`.
        tokenizer: Of the model, chat template included.
        folder: Existing.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config._attn_implementation = None
    with torch.device("meta"):
        shell = type(model)(config).to(dtype)
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    for weights in folder.glob("*.safetensors"):  # written so that only their owner may read them
        shutil.copymode(folder / "config.json", weights)
    tokenizer.save_pretrained(folder)
    _end_answers(folder / "generation_config.json", tokenizer)


def _end_answers(path: Path, tokenizer: Any) -> None:
    """Have whoever generates stop where training has ended answers, which the base may never have done."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = listed(settings.get("eos_token_id"))
    if missing := [end for end in end_ids(tokenizer) if end not in known]:
        settings["eos_token_id"] = [*known, *missing] if known or len(missing) > 1 else missing[0]
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
