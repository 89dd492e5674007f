"""The audit of preference data shown: python -m dpo audit DATA, and shortened at the head of a run."""

from __future__ import annotations

import json as json_format
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dpo.config import Config, DataConfig, ModelConfig
from dpo.data.audit import CONTRADICTS, REPEATS, RULES, Audit, audit, cached_audit
from dpo.data.chat import read_chat_template
from dpo.errors import UserError, printable
from dpo.model.load import BUILTIN, load_config, load_tokenizer
from dpo.run.checks import max_length
from dpo.run.data import prepare_data
from dpo.run.setup import Setup
from dpo.runtime.console import console_on, say, show_table
from dpo.runtime.distributed import only_main
from dpo.runtime.files import write_whole

DESCRIPTION = "Say what a preference data set is like: odd rows, leaks, lengths, and how far trivial rules get."
PLAIN_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %} {{ m.tool_calls | tojson }}{% endif %}"
    "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For conversations where the tokenizer has no chat template of its own; good enough to count by."""


@dataclass(frozen=True)
class AuditOptions:
    """Arguments of the verb."""

    data: str
    """Training data: hub id, folder, .jsonl, .json, .csv, .parquet, or builtin:world."""
    validation: str | None = None
    """Validation data; default: the validation (else test) split of DATA, if it has one."""
    tokenizer: str = BUILTIN
    """Hub id or folder of the policy's tokenizer; without it lengths are those of builtin:tiny, mostly bytes."""
    chat_template: str | None = None
    """Chat template (text or file) for conversations; default: the tokenizer's own, else a plain one."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    data_dir: str | None = None
    """Directory within a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    train_split: str = "train"
    """Split of DATA that is for training."""
    validation_split: str | None = None
    """Split for validation; default: validation, else test."""
    validation_fraction: float | None = None
    """Validate on this share of the prompts of DATA, as a run does (data.validation_fraction)."""
    format: Literal["auto", "hh", "prompt", "conversation", "ranked", "votes"] = "auto"
    """Schema of the rows; auto looks at the first ones."""
    ranked_pairs: Literal["best_worst", "best_each"] = "best_worst"
    """Pairs of a ranked list: the best completion against the worst, or against each that is rated lower."""
    max_length: int | None = None
    """Longest prompt + completion in tokens; default: 1024, or the context of the model at --tokenizer if shorter."""
    limit: int | None = None
    """Look only at the first rows of each source."""
    json: str | None = None
    """Also write the audit to this file; dpo/data/audit.py says what is in it."""
    cache_dir: str | None = None
    """Where tokenised data is kept; default: $DPO_CACHE, else ~/.cache/dpo."""

    def __post_init__(self) -> None:
        try:
            self.config()
        except ValueError as error:
            raise ValueError(_own_names(error)) from None

    def config(self) -> Config:
        """Settings of a run on this data, odd rows left out."""
        data = DataConfig(
            train=self.data, validation=self.validation, subset=self.subset, data_dir=self.data_dir,
            revision=self.revision, train_split=self.train_split, validation_split=self.validation_split,
            format=self.format, ranked_pairs=self.ranked_pairs, max_length=self.max_length, train_limit=self.limit,
            validation_fraction=self.validation_fraction, on_bad_row="skip", cache_dir=self.cache_dir,
            validation_limit=None if self.validation_fraction else self.limit,
        )  # fmt: skip
        return Config(model=ModelConfig(policy=self.tokenizer), data=data)


# --- the verb --------------------------------------------------------------------------------------------------------


def show_audit(options: AuditOptions) -> None:
    """Audit a data set, print it, and write it to a file if one is named.

    Raises:
        UserError: The data or the tokenizer cannot be read, or the file not be written.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    if options.chat_template is not None:
        tokenizer.chat_template = read_chat_template(options.chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    try:
        data = prepare_data(options.config(), tokenizer, _longest(options))
    except UserError as error:
        raise UserError(_own_names(error)) from None
    found = audit([one._replace(name=one.role) for one in (*data.train, *data.validation)], tokenizer)
    if options.json is not None:
        try:
            write_whole(Path(options.json), json_format.dumps(found, indent=1))
        except OSError as error:
            raise UserError(f"--json {options.json}: cannot be written: {error.strerror or error}") from None
    out = console_on(sys.stdout)
    for title, headings, rows in _tables(found):
        show_table(out, title, rows, headings)
    for line in (*_conclusions(found), *_remarks(options, found)):
        say(out, line)


def _own_names(error: Exception) -> str:
    """An error in the names of a run's settings, in those of the verb's options."""
    # Of both alone: the data may lie in a file data.json.
    keys = "|".join({field.name for field in fields(AuditOptions)} & {field.name for field in fields(DataConfig)})
    return re.sub(rf"\bdata\.({keys})\b", r"--\1", re.sub(r"\bdata\.train_limit\b", "--limit", str(error)))


def _longest(options: AuditOptions) -> int:
    """--max_length, by default that of a run on the model whose tokenizer is used, if there is one."""
    if options.max_length is not None or options.tokenizer == BUILTIN:
        return options.max_length or 1024
    try:
        return max_length(options.config(), load_config(options.tokenizer))
    except UserError:  # a tokenizer alone
        return 1024


def _remarks(options: AuditOptions, found: Audit) -> list[str]:
    lines = []
    if options.tokenizer == BUILTIN:
        lines.append(f"lengths are in tokens of {BUILTIN}, mostly bytes: give the policy's own by --tokenizer")
    if any(one["format"] not in ("hh", "prompt") for one in found["sets"]) and options.chat_template is None:
        lines.append("conversations are rendered by the tokenizer's chat template, else by a plain one")
    return lines + ([f"written to {options.json}"] if options.json else [])


def _tables(found: Audit) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Title, headings and rows of each table: findings and lengths of every set, leaks, heuristics."""
    tables: list[tuple[str, Sequence[str], list[list[str]]]] = []
    for one in found["sets"]:
        name = _called(one["role"], one["name"])
        title = f"{name}: {one['source']}, {one['rows']:,} rows ({one['format']}), {one['pairs']:,} pairs"
        rows = [
            [f["kind"], f"{f['count']:,}", f["fate"], ", ".join(map(str, f["rows"])), f["detail"]]
            for f in sorted(one["findings"], key=lambda f: (f["fate"] != "bad", -f["count"]))
        ]
        tables.append((title, ("looked for", "rows", "fate", "first of them", "in the first"), rows))
        spreads = [
            [name.replace("_", ", "), *(f"{spread[key]:,.0f}" for key in ("mean", "p50", "p90", "p99", "max"))]
            for name, spread in one["lengths"].items()
        ]
        title = f"{name}: lengths in tokens, cut to {one['max_length']:,}"
        tables.append((title, ("part", "mean", "median", "90 %", "99 %", "longest"), spreads))
    if found["leaks"]:
        rows = [
            [leak["validation"], leak["kind"], f"{leak['count']:,}", "; ".join(map(_example, leak["examples"]))]
            for leak in found["leaks"]
        ]
        tables.append(("leaks: in training and in validation", ("validation", "same", "rows", "examples"), rows))
    rows = [
        [RULES[rule], *("-" if h[rule] is None else f"{h[rule]:.1%}" for h in found["heuristics"])] for rule in RULES
    ]
    headings = ["the chosen completion is", *(_called(h["role"], h["set"]) for h in found["heuristics"])]
    return [*tables, ("how often trivial rules are right (a tie counts one half)", headings, rows)]


def _called(role: str, name: str) -> str:
    return role if name == role else f"{role} {name}"


def _example(example: dict[str, Any]) -> str:
    return f"row {example['row']} is row {example['train_row']} of {example['train']}"


# --- the head of a run -----------------------------------------------------------------------------------------------


def _conclusions(found: Audit) -> list[str]:
    """What to know before a run, in a line each: leaks, repetitions, and the accuracy to beat."""
    lines = []
    for one in found["sets"]:
        for finding in one["findings"]:
            if finding["kind"] in (REPEATS, CONTRADICTS) and finding["count"]:
                rows = ", ".join(map(str, finding["rows"]))
                lines.append(f"{one['name']}: {finding['kind']}: {finding['count']:,} (row {rows})")
    for leak in found["leaks"]:
        lines.append(
            f"leak: rows of {_called('validation', leak['validation'])} whose {leak['kind']} is in the training data:"
            f" {leak['count']:,} ({_example(leak['examples'][0])})"
        )
    if not found["leaks"] and len({one["role"] for one in found["sets"]}) > 1:
        lines.append("no leak: no validation row has a prompt of the training data")
    held = [h for h in found["heuristics"] if h["role"] == "validation"] or found["heuristics"]
    for one in held:
        rule = RULES[one["best"]] if one[one["best"]] >= 0.5 else f"not {RULES[one['best']]}"
        lines.append(
            f"{_called(one['role'], one['set'])}: the rule \"the chosen one is {rule}\" is right in"
            f" {one['baseline']:.1%} of the pairs: what a reward accuracy must beat"
        )
    return [printable(line) for line in lines]


def audit_run(setup: Setup) -> list[str]:
    """Write `audit.json` into the run directory and say the most important in a few lines; collective.

    It is cached with the tokenised data.

    Args:
        setup: The run; its directory exists.
    Returns:
        Lines for the log.
    """

    def work() -> list[str]:
        cache = Path(setup.config.data.cache_folder)
        sets = [one._replace(name=one.name or one.role) for one in (*setup.data.train, *setup.data.validation)]
        found = cached_audit(sets, setup.tokenizer, cache)
        conclusions = _conclusions(found)
        write_whole(setup.run / "audit.json", json_format.dumps(found | {"conclusions": conclusions}, indent=1))
        return [f"audit: {line}" for line in conclusions]

    return only_main(setup.world, work)
