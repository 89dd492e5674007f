"""Sources and their tokenised pairs by a path and a split, `train` where none is named: what most tests have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo.config import Source
from dpo.data import sources, tokenize

PLACE = {field.name for field in dataclasses.fields(Source)}


def _by_path(of_source: Callable[..., Any]) -> Callable[..., Any]:
    def of_path(path: str | Path, *args: Any, **options: Any) -> Any:
        place = {name: options.pop(name) for name in PLACE & {*options}}
        return of_source(Source(**{"split": "train"} | place | {"path": str(path)}), *args, **options)

    return of_path


load_source, stream_source, source_identity, splits_of, validation_split_of, prepare_pairs = map(
    _by_path,
    (
        sources.load_source, sources.stream_source, sources.source_identity, sources.splits_of,
        sources.validation_split_of, tokenize.prepare_pairs,
    ),
)  # fmt: skip
