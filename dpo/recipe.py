"""A recipe and the names of settings: what in a YAML file is none is refused in one line, with what was meant."""

from __future__ import annotations

import difflib
import os
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from dpo.config import Config
from dpo.errors import UserError, one_line

LARGEST_RECIPE = 2**18  # bytes; YAML is read at some 0.1 MB/s
ELSEWHERE = {
    "learning_rate": "optim.lr", "lr_scheduler_type": "optim.schedule", "warmup_ratio": "optim.warmup_steps",
    "num_train_epochs": "train.epochs", "per_device_train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size", "loss_type": "loss.name", "lora_r": "model.lora.r",
    "model_name_or_path": "model.policy", "ref_model": "reference.path", "dataset_name": "data.train",
    "eval_dataset": "data.validation", "bf16": "train.precision", "fp16": "train.precision",
}  # fmt: skip
"""What other trainers call a setting, where its own name is not like it."""


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
    _check_names(path, content or {}, get_type_hints(Config))


def _check_names(path: str, content: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> None:
    """Refuse names in a recipe that are no settings, and values where a section should be."""
    for key, value in content.items():
        name, hint = f"{prefix}{key}", known.get(str(key))
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"--recipe {path}: section {name} must hold keys, got {value!r}; fix or remove it")
            _check_names(path, value, get_type_hints(hint), f"{name}.")
        elif hint is None:
            wrong = f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name
            raise UserError(f"--recipe {path}: {unknown_key(wrong, keys_of())}")
        else:
            _refuse_endless(value, f"--recipe {path}: {name}")


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


def unknown_key(name: str, keys: list[str], program: str = "train_dpo.py") -> str:
    """Say that a key is none, and which may be meant."""
    known = ELSEWHERE.get(name.rpartition(".")[2])
    close = [known] if known in keys else difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    program = program if program.startswith("python") else f"python {program}"
    hint = f"did you mean {close[0]}?" if close else f"{program} --help lists all keys"
    return f"unknown key {name[:200]}; {hint}"
