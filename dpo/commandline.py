"""argv -> Config: the recipe, the flags over it, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import argparse
import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from dpo.config import Config
from dpo.errors import UserError

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        config: The resolved settings.
        deepspeed_json: Path given by --config, or None.
        recipe: Path of the recipe in use, or None.
        assumed_quickstart: True when nothing named a model or data, so the quickstart recipe was taken.
        dry_run: Stop before the first step and print the plan.
        prepare_only: Stop before the model is on a device.
    """

    config: Config
    deepspeed_json: str | None
    recipe: str | None
    assumed_quickstart: bool
    dry_run: bool
    prepare_only: bool


def _parser(recipe: str | None) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train_dpo.py",
        description="Direct Preference Optimization of a Hugging Face causal language model.",
        exit_on_error=False,
        default_config_files=[recipe] if recipe else [],
    )
    parser.add_argument("--config", help="DeepSpeed JSON: memory and communication, e.g. ds_configs/zero2.json")
    parser.add_argument("--recipe", help="YAML file with the sections below; flags override it")
    parser.add_argument("--dry_run", action="store_true", help="do everything up to the first step, print the plan")
    parser.add_argument(
        "--prepare_only", action="store_true", help="download, tokenise and fill caches; needs no GPU"
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ignored")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def _first_pass(argv: list[str]) -> tuple[str | None, bool]:
    """The recipe named in argv, and whether argv itself names a model or data."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    early.add_argument("--model.policy", dest="policy")
    early.add_argument("--data.train", dest="data")
    try:
        known, _ = early.parse_known_args(argv)
    except SystemExit:
        return None, True
    return known.recipe, known.policy is not None or known.data is not None


def _check_recipe(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"--recipe {path}: no such file; the recipes that come with the project are in recipes/")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: not valid YAML: {_one_line(str(error))}") from None
    if content is None:
        return
    if not isinstance(content, dict):
        raise UserError(f"--recipe {path}: expected sections such as 'train:', got {type(content).__name__}")
    for section, keys in content.items():
        if section in {f.name for f in fields(Config)} and not isinstance(keys, dict):
            raise UserError(f"--recipe {path}: section {section} must hold keys, got {keys!r}")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _known_keys(parser: ArgumentParser) -> list[str]:
    return [a.dest for a in parser._actions if a.dest not in ("help", "local_rank")]


def _explain(parser: ArgumentParser, error: Exception, source: str) -> str:
    """Turn the parser's message into one line that names key, value and fix."""
    text = str(error)
    unknown = (
        re.search(r"unrecognized arguments: --([\w.]+)", text)
        or re.search(r"Option '([\w.]+)' is not accepted", text)
    )
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    name = unknown.group(1) if unknown else f"{in_group.group(1)}.{in_group.group(2)}" if in_group else None
    if name is not None:
        close = difflib.get_close_matches(name, _known_keys(parser), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "python train_dpo.py --help lists all keys"
        return f"{source}unknown key {name}; {hint}"
    wrong = re.search(r'Parser key "([\w.]+)":(.*)', text, re.DOTALL)
    if wrong:
        key, rest = wrong.groups()
        value = re.search(r"(?:Got value|Given value): (.*)", rest)
        action = next((a for a in parser._actions if a.dest == key), None)
        got = value.group(1).strip() if value else "something else"
        return f"{source}{key} is {got}; use {_type_name(action)}"
    return source + _one_line(text)


def _type_name(action: Any) -> str:
    help_text = str(getattr(action, "help", "") or "")
    if action is not None and action.choices:
        return " or ".join(map(str, action.choices))
    hint = getattr(action, "_typehint", None) or getattr(action, "type", None)
    text = getattr(hint, "__name__", None) if not hasattr(hint, "__args__") else str(hint)
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    text = words.get(str(text), str(text or help_text))
    return re.sub(r"typing\.|<class '(\w+)'>", r"\1", text).replace("Literal", "one of ")


def parse(argv: list[str]) -> Command:
    """Parse a command line into a resolved config.

    Args:
        argv: Arguments without the program's name.
    Returns:
        The command; nothing has been read but the recipe.
    Raises:
        UserError: One line naming key, value and fix.
        SystemExit: After --help (code 0).
    """
    recipe, names_model_or_data = _first_pass(argv)
    assumed = recipe is None and not names_model_or_data
    if assumed:
        recipe = str(QUICKSTART)
    if recipe is not None:
        _check_recipe(recipe)
    parser = _parser(recipe)
    try:
        parsed = parser.parse_args(argv)
        values = parser.instantiate(parsed)
        config = Config(**{f.name: getattr(values, f.name) for f in fields(Config)})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(parser, error, "")) from None
    return Command(
        config=config,
        deepspeed_json=values.config,
        recipe=recipe,
        assumed_quickstart=assumed,
        dry_run=values.dry_run,
        prepare_only=values.prepare_only,
    )
