"""Write the tables of docs/objectives.md from the code: equations and papers from the docstrings of the functions, the
rest from dpo/objective/catalog.py. The text around them is written by hand.

    python -m docs.loss_table
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo.objective import coupled, losses, reference_free
from dpo.objective.catalog import LOSSES, MODIFIERS, Facts, LossName

PAGE = Path(__file__).with_name("objectives.md")
BEGIN, END = "<!-- losses: begin -->\n", "<!-- losses: end -->"


def function_of(name: LossName) -> Callable[..., Any]:
    """The function of that name."""
    return next(getattr(module, name) for module in (losses, reference_free, coupled) if hasattr(module, name))


def _parts(name: LossName) -> tuple[str, str, str]:
    """Summary, equation and source of a loss, from its docstring."""
    text = inspect.getdoc(function_of(name)) or ""
    equation = re.search(r"^loss = (.+)$", text, re.MULTILINE)
    source = re.search(r"^Source:\n(.+)", text, re.MULTILINE | re.DOTALL)
    assert equation and source, f"the docstring of {name} lacks its equation or its source"
    summary = re.split(r"\n\n", text)[0]
    return " ".join(summary.split()), equation.group(1), " ".join(source.group(1).split())


def _linked(source: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _options(facts: Facts) -> str:
    own = [f"`{option}`" for option in facts.options if option not in MODIFIERS]
    return ", ".join(own) or "-"


def _mark(flag: bool) -> str:
    return "yes" if flag else "no"


def render() -> str:
    """Both tables."""
    rows = ["| `loss.name` | loss of a pair | reference | couples pairs | own options | who else |", "| --- " * 6 + "|"]
    notes = []
    for name, facts in LOSSES.items():
        summary, equation, source = _parts(name)
        cells = (f"`{name}`", f"`{equation}`", _mark(facts.needs_reference), _mark(facts.couples), _options(facts))
        rows.append(f"| {' | '.join(cells)} | {facts.peers} |")
        notes.append(f"- **`{name}`**: {summary} {_linked(source)}.")
    modifiers = ["| loss | " + " | ".join(f"`{m}`" for m in MODIFIERS) + " |", "| --- " * (len(MODIFIERS) + 1) + "|"]
    for name, facts in LOSSES.items():
        taken = ["yes" if m in facts.options else "" for m in MODIFIERS]
        if any(taken):
            modifiers.append(f"| `{name}` | {' | '.join(taken)} |")
    return "\n".join([*rows, "", *notes, "", "Which loss takes which modifier:", "", *modifiers]) + "\n"


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{render()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
