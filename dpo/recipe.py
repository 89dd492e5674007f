"""A recipe and the names of settings: what in a YAML file is none is refused in one line, with what was meant."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dpo.config import Config
from dpo.errors import UserError, one_line

NAMED = 8
"""Unknown keys that one message names."""
LARGEST_RECIPE = 2**18  # bytes; YAML is read at some 0.1 MB/s
ELSEWHERE = {
    "learning_rate": "optim.lr", "lr_scheduler_type": "optim.schedule", "warmup_ratio": "optim.warmup_steps",
    "num_train_epochs": "train.epochs", "per_device_train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size", "loss_type": "loss.name", "lora_r": "model.lora.r",
    "model_name_or_path": "model.policy", "ref_model": "reference.path", "dataset_name": "data.train",
    "eval_dataset": "data.validation", "bf16": "train.precision", "fp16": "train.precision",
    "torch_dtype": "train.precision", "dtype": "train.precision", "adam_epsilon": "optim.eps",
    "adam_beta1": "optim.betas", "adam_beta2": "optim.betas", "optim": "optim.name", "logging_steps": "log.every",
    "report_to": "log.backends", "eval_steps": "train.eval_every", "eval_strategy": "train.eval_every",
    "save_steps": "train.save_every", "save_strategy": "train.save_every", "save_total_limit": "train.keep_checkpoints",
    "save_only_model": "train.save_weights_only", "resume_from_checkpoint": "train.resume",
    "full_determinism": "train.deterministic", "data_seed": "train.seed", "ddp_timeout": "train.hang_timeout",
    "torch_compile": "model.compile", "padding_free": "train.layout", "group_by_length": "train.layout",
    "per_device_eval_batch_size": "train.tokens_per_micro_batch", "dataset_num_proc": "data.workers",
    "precompute_ref_log_probs": "reference.mode", "ref_model_sync_steps": "reference.sync_steps",
    "ref_model_mixup_alpha": "reference.sync_alpha", "sync_ref_model": "reference.sync_steps",
    "f_divergence_type": "loss.f_divergence", "loss_weights": "loss.weights", "use_weighting": "loss.wpo",
    "processing_class": "model.tokenizer", "lora_alpha": "model.lora.alpha", "target_modules": "model.lora.targets",
    "attn_implementation": "model.attention", "dataset_config": "data.subset", "batch_size": "train.global_batch_size",
    "rpo_alpha": "loss.name '[sigmoid, sft]' --loss.weights '[1, ALPHA]'",
    "truncation_mode": "data.max_prompt_length", "lora_rank": "model.lora.r",
    "lora_target": "model.lora.targets", "lora_target_modules": "model.lora.targets",
}  # fmt: skip
"""What other trainers call a setting, where its own name is not like it."""
VALUES_ELSEWHERE = {
    "dpo": "sigmoid", "kto": "bco_pair", "kto_pair": "bco_pair", "rpo": "[sigmoid, sft]", "dpo_norm": "sigmoid_norm",
    "mpo": "[sigmoid, bco_pair, sft]", "slic": "hinge", "cdpo": "sigmoid with loss.label_smoothing", "bco": "bco_pair",
    "wpo": "sigmoid with loss.wpo", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "fa2": "flash",
    "flash_attention_2": "flash", "adamw_torch": "adamw", "constant_with_warmup": "constant with optim.warmup_steps",
}  # fmt: skip
"""What other trainers and papers call a value of a setting, where its own name is not like it."""
NOWHERE = {
    "load_best_model_at_end": "the best checkpoint is kept, and python -m dpo export RUN --checkpoint best writes it",
    "metric_for_best_model": "the best checkpoint is that of the highest validation accuracy",
    "greater_is_better": "the best checkpoint is that of the highest validation accuracy",
    "early_stopping_patience": "the best checkpoint is kept, and python -m dpo export RUN --checkpoint best writes it",
    "push_to_hub": "final/ is a folder as the hub has them: hf upload NAME RUN/final",
    "hub_model_id": "final/ is a folder as the hub has them: hf upload NAME RUN/final",
    "use_liger_kernel": "the fast path is the default (docs/performance.md)",
    "dataloader_drop_last": "every pair is trained on, the last batch of an epoch by its own size",
    "dataloader_num_workers": "batches are made ahead in a thread of their own",
    "remove_unused_columns": "columns that no format reads are ignored",
    "disable_dropout": "there is no dropout: a step is defined by its pairs",
    "neftune_noise_alpha": "there is no noise: a step is defined by its pairs",
    "modules_to_save": "adapters alone are trained and saved (docs/adapters.md)",
}
"""What other trainers have and this one has not, and what there is in its place."""


class _Loader(yaml.SafeLoader):
    """Plain values alone, every key once, where YAML would take the last without a word.

    A tag may name anything; a few lines of aliases may mean gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            problem = "a tag, anchor or alias (!, &, *) stands before a value; quote it, or write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, name in enumerate(names):
            if name in names[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{name} is given twice; keep one", problem_mark=mark)
        return super().construct_mapping(node, deep)


def _read_recipe(path: str) -> Any:
    """The YAML of a recipe, as plain values."""
    if not os.path.isfile(path):
        raise UserError(f"--recipe {path}: no such file; the recipes that come with the project are in recipes/")
    size = os.path.getsize(path)
    if size > LARGEST_RECIPE:
        raise UserError(f"--recipe {path}: a file of {size:,} bytes is no recipe; name one of settings alone")
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, 2024-13-45
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else str(error).split(";")[0]
        raise UserError(f"--recipe {path}: not valid YAML: {one_line(where)}; fix it") from None


def check_recipe(path: str) -> None:
    """Refuse what is no recipe: not YAML, not sections, not our keys."""
    content = _read_recipe(path)
    if not isinstance(content, dict | None):
        raise UserError(f"--recipe {path}: expected sections such as 'train:', got {type(content).__name__}; fix it")
    if unknown := _unknown_names(path, content or {}, get_type_hints(Config)):
        raise UserError(f"--recipe {path}: {unknown_keys(unknown, keys_of())}")


def _unknown_names(path: str, content: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    """Names in a recipe that are no settings; values where a section should be are refused."""
    unknown = []
    for key, value in content.items():
        name, hint = f"{prefix}{key}", known.get(str(key))
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"--recipe {path}: section {name} must hold keys, got {value!r}; fix or remove it")
            unknown += _unknown_names(path, value, get_type_hints(hint), f"{name}.")
        elif hint is None:
            unknown.append(f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name)
        else:
            _refuse_endless(value, f"--recipe {path}: {name}")
    return unknown


def _refuse_endless(value: Any, name: str) -> None:
    """A number of hundreds of digits would overflow as a float somewhere in the parser, which does not say where."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{name} is a number of {value.bit_length()} bits; use a smaller one")


def keys_of(section: Any = Config, prefix: str = "") -> list[str]:
    """Names of all settings."""
    return [
        name
        for key, hint in get_type_hints(section).items()
        for name in (keys_of(hint, f"{prefix}{key}.") if is_dataclass(hint) else [prefix + key])
    ]


def _closest(name: str, last: str, keys: list[str]) -> str | None:
    """The key whose last part is most like that of a name, within its section unless it is the same.

    Whole names would not do: that of a section makes all of its keys alike.
    """
    section = name.rpartition(".")[0]
    ends = {key: key.rpartition(".")[2] for key in keys}
    near = [key for key in keys if ends[key] == last or not section or key.startswith(f"{section}.")]
    like = difflib.get_close_matches(last, [ends[key] for key in near], n=1, cutoff=0.7)
    same = [key for key in near if ends[key] in like]
    return next(iter(difflib.get_close_matches(name, same, n=1, cutoff=0)), None)


def unknown_value(value: str, choices: list[str]) -> str:
    """Which of the values that a setting takes may be meant; empty where none is like it.

    Args:
        value: As it was given; of a list the first that is none of the choices is looked at.
        choices: Names that the setting takes.
    """
    if value == "all-linear":
        return "; leave it out for all linear layers"
    words = [word for word in re.findall(r"[\w-]+", value) if word not in choices]
    if not words or not choices:
        return ""
    meant = VALUES_ELSEWHERE.get(words[0], "")
    if meant.strip("[").partition(",")[0].partition(" ")[0] not in choices:
        meant = next(iter(difflib.get_close_matches(words[0], choices, n=1, cutoff=0.6)), "")
    return f"; did you mean {meant}?" if meant else ""


def unknown_keys(names: list[str], keys: list[str], program: str = "train_dpo.py") -> str:
    """Say of several keys that they are none, and which may be meant."""
    told = [unknown_key(name, keys, program) for name in names[:NAMED]]
    return "; ".join(told) + (f"; and {len(names) - NAMED} more" if len(names) > NAMED else "")


def unknown_key(name: str, keys: list[str], program: str = "train_dpo.py") -> str:
    """Say that a key is none, and which may be meant."""
    last, of_run = name.rpartition(".")[2].replace("-", "_"), "train.epochs" in keys
    if of_run and last in NOWHERE:
        return f"unknown key {name[:200]}; {NOWHERE[last]}"
    in_section = "_".join(name.split(".")[-2:])  # lora.rank is somebody's lora_rank
    close = ELSEWHERE.get(last) or ELSEWHERE.get(in_section) if of_run else None
    close = close or _closest(name, last, keys) or (_closest(last, last, list(ELSEWHERE)) if of_run else None)
    close = ELSEWHERE.get(close, close) if of_run and close else close
    program = program if program.startswith("python") else f"python {program}"
    hint = f"did you mean {close}?" if close else f"{program} --help lists all keys"
    return f"unknown key {name[:200]}; {hint}"
