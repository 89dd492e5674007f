"""Lines and tables on a terminal, which neither obeys what stands in them nor reads it as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.errors import printable

NUMBER = re.compile(r"-?|[-+]?[\d.,]+(e[-+]?\d+)?(%| min)?|-?(nan|inf)")
"""What stands in a column of numbers; a dash or nothing where there is none."""


def console_on(stream: IO[str]) -> Console:
    """A console that breaks no line and colours no number."""
    return Console(file=stream, highlight=False, soft_wrap=True, emoji=False)


def say(console: Console, text: str) -> None:
    """Show lines, the control characters in them as escapes."""
    console.print(printable(text, keep="\n"), markup=False)


def show_table(
    console: Console, title: str, rows: Sequence[Sequence[str]], headings: Sequence[str] | None = None
) -> None:
    """Show a table; columns of numbers under a heading stand to the right.

    Args:
        console: Of `console_on`.
        title: Above it.
        rows: All of equal length.
        headings: Of the columns; None for none.
    """
    table = Table(title=Text(printable(title)), title_justify="left", show_header=headings is not None)
    for index, heading in enumerate(headings or ()):
        numbers = index > 0 and all(NUMBER.fullmatch(row[index]) for row in rows)
        table.add_column(Text(printable(heading)), justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
