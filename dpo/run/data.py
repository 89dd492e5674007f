"""The data of a run: its sources tokenised, training ones mixed, validation ones side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo.config import Config, Source
from dpo.data.mixture import Mixture, Pairs, quotas, share_lines
from dpo.data.sources import splits_of, validation_split_of
from dpo.data.store import DataSet
from dpo.data.tokenize import EmptyShare, prepare_pairs
from dpo.data.workers import WHOLE
from dpo.errors import UserError

OR_HOLD_OUT = "or hold out a share of the prompts by data.validation_fraction"


@dataclass(frozen=True)
class RunData:
    """Tokenised data of a run.

    Attributes:
        train: Training sources, in the order of data.train.
        validation: Validation sources, likewise; their names are those of data.validation, "" for one without.
        quotas: Pairs of each training source in an epoch; empty where no weights are given, so that each comes once.
        notes: Lines for the log.
    """

    train: tuple[DataSet, ...]
    validation: tuple[DataSet, ...]
    quotas: tuple[int, ...]
    notes: tuple[str, ...]

    def train_pairs(self) -> Pairs:
        """All training pairs, one source behind the other."""
        return _joined(self.train)

    def validation_pairs(self) -> Pairs | None:
        """All validation pairs likewise; None where there are none."""
        return _joined(self.validation) if self.validation else None

    def validation_sets(self) -> dict[str, range]:
        """Name -> ids within `validation_pairs`."""
        sets, start = {}, 0
        for one in self.validation:
            sets[one.name] = range(start, start + len(one.pairs))
            start += len(one.pairs)
        return sets

    def parts(self) -> tuple[tuple[int, int], ...]:
        """Pairs of every training source and how many of them an epoch takes, for `epochs.Epochs`."""
        return tuple(zip((len(one.pairs) for one in self.train), self.quotas, strict=True)) if self.quotas else ()


def _joined(sets: Sequence[DataSet]) -> Pairs:
    return sets[0].pairs if len(sets) == 1 else Mixture([one.pairs for one in sets], [one.name for one in sets])


def _validation_sources(config: Config) -> list[Source]:
    """Validation sources with their splits; none where there is no validation."""
    data = config.data
    if data.validation_sources:
        return [
            replace(one, split=one.split or validation_split_of(one) or data.train_split)
            for one in data.validation_sources
        ]
    if not isinstance(data.train, str):
        return []
    (source,), split = data.train_sources, data.validation_split
    if split and split not in splits_of(source):
        raise UserError(
            f"data.validation_split is {split} but data.train {data.train} has no such split;"
            f" name the validation data by data.validation"
        )
    split = split or validation_split_of(source)
    return [] if split in (None, data.train_split) else [replace(source, split=split)]


def _why_no_validation(config: Config) -> str:
    if not isinstance(config.data.train, str):
        return f"no validation: data.train is a list of sources; name validation data by data.validation, {OR_HOLD_OUT}"
    names = splits_of(config.data.train_sources[0])
    others = [name for name in names if name != config.data.train_split]
    hint = f"; it has {', '.join(others)}: name one by data.validation_split," if others else "; name it,"
    none = "no validation: data.validation is not set and data.train has no split validation or test"
    return f"{none}{hint} {OR_HOLD_OUT}"


def _named(sources: Sequence[Source]) -> list[str]:
    """What to call training sources: their names, else the shortest part of the path that tells them apart."""
    for depth in (1, 2):
        names = [s.name or "/".join(Path(s.path).parts[-depth:]) for s in sources]
        if len(set(names)) == len(names):
            return names
    return [s.name or f"{number} {s.path}" for number, s in enumerate(sources, start=1)]


def prepare_data(config: Config, tokenizer: Any, longest: int) -> RunData:
    """Read and tokenise the data of a run, or open it where this was done before.

    Args:
        config: Settings.
        tokenizer: The policy's.
        longest: data.max_length, resolved.
    Raises:
        UserError: Anything wrong with the data; one line.
    """
    data = config.data

    def prepared(
        source: Source, name: str, role: str, limit: int | None, of_prompts: tuple[float, float] = WHOLE
    ) -> DataSet:
        whole = replace(source, split=source.split or data.train_split, format=source.format or data.format)
        pairs, report = prepare_pairs(
            whole,
            tokenizer,
            limit=limit,
            of_prompts=of_prompts,
            max_length=longest,
            max_prompt_length=data.max_prompt_length or longest // 2,
            on_bad_row=data.on_bad_row,
            ranked_pairs=data.ranked_pairs,
            chat_template_kwargs=data.chat_template_kwargs,
            streaming=data.streaming,
            workers=data.workers,
            cache_dir=data.cache_folder,
        )
        return DataSet(name, role, pairs, report)

    sources, held_out, limit = data.train_sources, data.validation_fraction or 0.0, data.train_limit
    named = zip(sources, _named(sources), strict=True)
    train = tuple(prepared(s, name, "train", limit, (held_out, 1.0)) for s, name in named)
    if held_out:
        share = 0.0, held_out
        validation, empty = _held_out(sources, lambda s: prepared(s, s.name or "", "validation", limit, share))
    else:
        empty = []
        limit = data.validation_limit
        validation = tuple(prepared(s, s.name or "", "validation", limit) for s in _validation_sources(config))
    notes = [line for one in train for line in one.report.lines()]
    taken: list[int] = []
    if len(train) > 1:
        sizes = [len(one.pairs) for one in train]
        weights = [source.weight for source in sources if source.weight is not None]
        taken = quotas(sizes, weights) if weights else []
        notes += share_lines([one.pairs for one in train], [one.name for one in train], taken or sizes)
    for one in validation:
        if one.name:
            notes.append(f"validation {one.name}:")
        notes += one.report.lines()
    notes += [f"validation: {line}" for line in empty]
    if not validation:
        notes.append(_why_no_validation(config))
    if "odpo" in config.loss.names:
        for one in (*train, *validation):
            _check_margins(one, positive=config.loss.odpo_scale == "log")
    return RunData(train, validation, tuple(taken), tuple(notes))


def _held_out(
    sources: Sequence[Source], prepared: Callable[[Source], DataSet]
) -> tuple[tuple[DataSet, ...], list[str]]:
    """The held-out share of every source that has one, and why the others have none.

    Raises:
        UserError: If none has.
    """
    found, empty = [], []
    for source in sources:
        try:
            found.append(prepared(source))
        except EmptyShare as error:
            empty.append(str(error))
    if not found:
        raise UserError(empty[0])
    return tuple(found), empty


def _check_margins(one: DataSet, *, positive: bool) -> None:
    """Refuse data whose pairs do not all have the margin that the loss is a function of."""
    margins = one.pairs.margins
    bad = ~(margins > 0) if positive else np.isnan(margins)
    if bad.any():
        row = int(one.pairs.row_numbers[int(bad.argmax())])
        raise UserError(
            f"loss.name odpo needs a margin{' above 0' if positive else ''} for every pair and {int(bad.sum()):,} of"
            f" {one.report.source} have none, first row {row}: give ratings (docs/data.md), or another loss"
        )
