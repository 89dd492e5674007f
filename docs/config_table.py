"""Write docs/settings.md from the dataclasses of dpo/config.py, which own every setting, its default and its help.

    python -m docs.config_table > docs/settings.md
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from docstring_parser import parse_from_object

from dpo.config import Config

HEADER = """# Settings

Generated from `dpo/config.py` by `python -m docs.config_table > docs/settings.md`; do not edit.

A recipe holds these keys in sections, a flag names both: `loss: {beta: 0.1}` is `--loss.beta 0.1`. Flags override the
recipe, the recipe overrides the defaults below. Four flags belong to the command and not to the run: `--config`
(DeepSpeed JSON), `--recipe`, `--dry_run`, `--prepare_only`. An empty default is explained in the last column.
"""


def _type_text(hint: Any) -> str:
    """A type as a reader of recipes would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(
            "a list of them" if typing.get_origin(part) is tuple and typing.get_args(part)[0] in arguments
            else _type_text(part)
            for part in arguments if part is not type(None)
        )  # fmt: skip
    if origin is tuple and dict[str, Any] in typing.get_args(arguments[0]):
        return "list of paths and mappings"
    if origin is tuple:
        item = _type_text(arguments[0])
        return f"list of {item}" if Ellipsis in arguments else f"list of {len(arguments)} {item}s"
    if origin is dict:
        return "mapping"
    return {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[hint]


def _default_text(value: Any) -> str:
    if value is None or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _help(section: type) -> dict[str, str]:
    """Key -> the text under it."""
    return {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(section).params}


def _table(name: str, section: type) -> str:
    help_texts, hints = _help(section), typing.get_type_hints(section)
    title = f"## {name}\n\n{(section.__doc__ or '').strip()}\n\n"
    rows = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    nested = ""
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            nested += "\n" + _table(f"{name}.{field.name}", hints[field.name])
            continue
        cells = (f"`{name}.{field.name}`", _type_text(hints[field.name]), _default_text(field.default))
        rows.append(f"| {' | '.join(cells)} | {help_texts[field.name].replace('|', '/')} |")
    return title + "\n".join(rows) + "\n" + nested


def render() -> str:
    """The whole of docs/settings.md."""
    sections = typing.get_type_hints(Config)
    return HEADER + "".join(f"\n{_table(field.name, sections[field.name])}" for field in dataclasses.fields(Config))


if __name__ == "__main__":
    print(render(), end="")
