"""argv -> Config: the recipe, the flags over it, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from dpo.config import Config
from dpo.errors import UserError, one_line
from dpo.recipe import check_recipe, keys_of, unknown_key, unknown_keys, unknown_value

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
DESCRIPTION = "Direct Preference Optimization of a Hugging Face causal language model."


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
        options: Of a verb, as its own dataclass; None for train_dpo.py.
    """

    config: Config
    deepspeed_json: str | None
    recipe: str | None
    assumed_quickstart: bool
    dry_run: bool
    prepare_only: bool
    options: Any = None


@dataclass(frozen=True)
class Verb:
    """A command beside training that takes a run's settings and some of its own.

    Attributes:
        name: As in python -m dpo NAME.
        description: For --help.
        options: Dataclass of its own flags.
    """

    name: str
    description: str
    options: type


@cache
def _parser(verb: Verb | None) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"python -m dpo {verb.name}" if verb else "train_dpo.py",
        description=verb.description if verb else DESCRIPTION,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="DeepSpeed JSON: memory and communication, e.g. ds_configs/zero2.json")
    parser.add_argument("--recipe", help="YAML file with the sections below; flags override it")
    if verb:
        parser.add_class_arguments(verb.options, as_group=False)
    else:
        parser.add_argument("--dry_run", action="store_true", help="do everything up to the first step, print the plan")
        parser.add_argument(
            "--prepare_only", action="store_true", help="download, tokenise and fill caches; needs no GPU"
        )
        parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; ignored")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse_options(argv: list[str], name: str, description: str, options: type) -> Any:
    """Parse the command line of a verb that takes none of a run's settings.

    Args:
        argv: Arguments after the verb.
        name, description: Of the verb, for --help.
        options: Dataclass of its arguments: fields without a default are positional, the others flags.
    Returns:
        An instance of `options`.
    Raises:
        UserError: One line naming argument, value and fix.
        SystemExit: After --help (code 0).
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"python -m dpo {name}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(options, as_group=False, as_positional=True)
    try:
        values = parser.instantiate(parser.parse_args(argv))
        return options(**{f.name: getattr(values, f.name) for f in fields(options)})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(parser, error)) from None


def config_of(run: Path) -> Config:
    """The settings that a run directory was made with.

    Raises:
        UserError: If it is none.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run directory: it has no config.yaml; give the folder of a run")
    return parse(["--recipe", str(run / "config.yaml")]).config


def _first_pass(argv: list[str]) -> tuple[str | None, bool]:
    """The recipe named in argv, and whether argv itself names a model or data, or only asks for help."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", nargs="?")
    early.add_argument("--model.policy", dest="policy", nargs="?")
    early.add_argument("--data.train", dest="data", nargs="?")
    known, _ = early.parse_known_args(argv)
    asks_for_help = "-h" in argv or "--help" in argv
    return known.recipe, known.policy is not None or known.data is not None or asks_for_help


def _explain(parser: ArgumentParser, error: Exception) -> str:
    """Turn the parser's message into one line that names key, value and fix."""
    text = str(error)
    if text.startswith("Problems parsing config"):  # its own reader of YAML is a little stricter than ours
        reason = one_line(text.partition(":")[2])
        return f"--recipe {parser.default_config_files[0]}: not valid YAML: {reason}; fix it"
    if unknown := re.search(r"unrecognized arguments: (.*)", text, re.DOTALL):
        settings = keys_of() if any("." in a.dest for a in parser._actions) else []
        if unknown.group(1).startswith("--"):
            own = [a.dest for a in parser._actions if "." not in a.dest]
            names = re.findall(r"(?<!\S)--([^\s=]*)", unknown.group(1))
            return unknown_keys(names, [*settings, *own], parser.prog)
        name = unknown.group(1).partition(" ")[0]
        known = "settings are given as --section.key VALUE" if settings else f"{parser.prog} --help lists all arguments"
        return f"unknown argument {name or repr('')}; {known}"
    if wrong := re.search(r'Parser key "([\w.]+)":(.*)', text, re.DOTALL):
        key, rest = wrong.groups()
        value = re.search(r"(?:Got value|Given value): (.*)|Unable to load config '(.*)'", rest)
        got = next(filter(None, value.groups()), "''") if value else "something else"
        if inner := re.match(r"NestedArg\(key='(.*?)'", got):
            return unknown_key(f"{key}.{inner.group(1)}", keys_of(), parser.prog)
        hint = next((getattr(a, "_typehint", None) for a in parser._actions if a.dest == key), None)
        use = _type_name(hint) if hint else f"its keys, as in --{key}.KEY VALUE"
        return f"{key} is {got}; use {use}{unknown_value(got, _choices(hint))}"
    if bare := re.fullmatch(r"argument --([\w.]+): expected one argument", text.strip()):
        hint = next((getattr(a, "_typehint", None) for a in parser._actions if a.dest == bare.group(1)), None)
        return f"--{bare.group(1)} has no value; use {_type_name(hint) if hint else 'a path'}"
    if extra := re.search(r"argument (?:-h/)?--(\w+): ignored explicit argument (.*)", text, re.DOTALL):
        return f"--{extra.group(1)} takes no value, got {extra.group(2)}; leave the value out"
    return one_line(text)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", ...: "..."}


def _type_name(hint: Any) -> str:
    """What a user may write for a setting of this type."""
    if hint in _WORDS:
        return _WORDS[hint]
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is dict:
        return "a mapping such as {key: value}"
    if hint == tuple[dict[str, Any] | str, ...]:
        return "a list of paths and of mappings {path: ...}"
    parts = get_args(hint)
    names = [
        "a list of them" if get_origin(part) is tuple and get_args(part)[0] in parts else _type_name(part)
        for part in parts
        if part is not type(None)
    ]
    return f"[{', '.join(names)}]" if get_origin(hint) is tuple else " or ".join(names)


def _choices(hint: Any) -> list[str]:
    """The names that a setting of this type takes, if it takes names."""
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if isinstance(choice, str)]
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _refuse_odd(argv: list[str]) -> None:
    """Refuse bytes that are no UTF-8, and whole sections, whose value the parser would take for a file to read."""
    sections = {f"--{key.rpartition('.')[0]}" for key in keys_of()}
    for index, argument in enumerate(argv):
        section, _, value = argument.partition("=")
        if section in sections:
            got = value or " ".join(argv[index + 1 : index + 2])
            raise UserError(f"{section[2:]} is {got[:200]}; use its keys, as in {section}.KEY VALUE")
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            given = " ".join(argv[max(0, index - 1) : index + 1])
            raise UserError(f"argument {given[:200]!r} is not UTF-8; rename what it names") from None


def _refuse_null(parser: ArgumentParser, parsed: Any) -> None:
    """The parser lets null pass everywhere; only a setting that is null by default may be."""
    for action in parser._actions:
        if "." in action.dest and action.default is not None and parsed[action.dest] is None:
            raise ValueError(f"{action.dest} is null; use {_type_name(getattr(action, '_typehint', None))}")


def parse(argv: list[str], verb: Verb | None = None) -> Command:
    """Parse a command line into a resolved config.

    Args:
        argv: Arguments without the program's name.
        verb: Whose flags are taken in place of train_dpo.py's own.
    Returns:
        The command; nothing has been read but the recipe.
    Raises:
        UserError: One line naming key, value and fix.
        SystemExit: After --help (code 0).
    """
    _refuse_odd(argv)
    recipe, names_model_or_data = _first_pass(argv)
    assumed = recipe is None and not names_model_or_data
    if assumed:
        recipe = str(QUICKSTART)
    if recipe is not None:
        check_recipe(recipe)
    parser = _parser(verb)
    parser.default_config_files = [recipe] if recipe else []
    try:
        parsed = parser.parse_args(argv)
        _refuse_null(parser, parsed)
        values = parser.instantiate(parsed)
        config = Config(**{f.name: getattr(values, f.name) for f in fields(Config)})
        options = verb.options(**{f.name: getattr(values, f.name) for f in fields(verb.options)}) if verb else None
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(parser, error)) from None
    except OverflowError:
        at = max(range(len(argv)), key=lambda index: len(argv[index]))
        given = " ".join(argv[max(0, at - 1) : at + 1])
        raise UserError(f"{given[:100]}... is too large a number; use a smaller one") from None
    return Command(
        config=config,
        deepspeed_json=values.config,
        recipe=recipe,
        assumed_quickstart=assumed,
        dry_run=verb is None and values.dry_run,
        prepare_only=verb is None and values.prepare_only,
        options=options,
    )
