"""Preference data -> token ids on disk: read, convert, encode, once per content and per node.

`prepare_pairs` is the door: source -> rows -> PreferenceRow -> ids. The result lies in a folder of the cache named by a
hash of everything it depends on (rows, tokenizer, template, lengths, code version) and is memory-mapped. It is written
under a temporary name and renamed, so a killed process leaves nothing half-written; a lock per key makes the processes
of a node do the work once. Bad rows are counted by kind, a row under each kind it has; dropped or refused.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from filelock import FileLock

from dpo.config import Source
from dpo.data.encode import PairEncoder
from dpo.data.formats import FORMATS, detect_format
from dpo.data.sources import load_source, source_identity, stream_source
from dpo.data.store import (
    COLUMNS,
    DataReport,
    KindCount,
    TokenizedPairs,
    cache_folder,
    content_key,
    publish,
    read_report,
    remove_leftovers,
    temporary,
)
from dpo.data.workers import WHOLE, Job, Part, num_workers, parts
from dpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 6  # raise it with every change that gives other ids or other counts
DETECTION_ROWS = 100


def prepare_pairs(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path,
    limit: int | None = None,
    of_prompts: tuple[float, float] = WHOLE,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    on_bad_row: str = "error",
    ranked_pairs: str = "best_worst",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    streaming: bool = False,
    workers: int | None = None,
) -> tuple[TokenizedPairs, DataReport]:
    """Read and tokenise one split of preference data, or open it where this was done before.

    Lengths count the end tokens: "longer than max_length" is prompt + longer completion + end token > max_length.

    Args:
        source, limit: As for `sources.load_source`; without a format it is told from the first rows.
        tokenizer: The policy's tokenizer; not changed.
        cache_dir: Folder for tokenised data.
        of_prompts: Part of [0, 1): pairs are kept whose prompt has its hash there. Parts that do not overlap share no
            prompt, and a prompt is in the same part whatever other rows there are; under one tokenizer.
        max_length: Most tokens of a prompt and one completion together, end token included, >= 2.
        max_prompt_length: In a pair that exceeds `max_length`, the prompt may lose its start down to this many tokens
            (a BOS stays) before the completions lose their ends. None: prompts are never cut, and a prompt of
            `max_length` tokens or more, which leaves no room for a completion, makes a bad row.
        on_bad_row: "error" stops at the first bad row, "skip" drops and counts them.
        ranked_pairs: Pairs of a ranked row: "best_worst" makes one, "best_each" one for every lower completion.
        chat_template_kwargs: Further arguments of the tokenizer's chat template; those of a row come before them.
        streaming: Read the rows one by one, once, and keep no text: for sources that fit neither disk nor memory. The
            cache is then keyed by `sources.source_identity` and not by the rows.
        workers: Processes that tokenise; None: one per 4,096 rows, no more than the CPUs, nor 16.
    Returns:
        The pairs, in row order, and what was found in the data.
    Raises:
        UserError: Anything wrong with the data or the settings; one line.
    """
    form = source.format or "auto"
    _check_settings(form, on_bad_row, workers)
    called = f"{source.path} [{source.split}]" if source.split and not Path(source.path).is_file() else source.path
    rows: Any = [source_identity(source, limit)] if streaming else load_source(source, limit)
    if form == "auto" and not streaming:
        form = detect_format(islice(rows, DETECTION_ROWS), source.path)
    # Before the key: probing the tokenizer also clears what earlier calls left in it (truncation, padding).
    encoder = PairEncoder(
        tokenizer, max_length=max_length, max_prompt_length=max_prompt_length,
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    settings = (
        # None stands where a template of its own once did, so that what is cached is found.
        CODE_VERSION, form, max_length, max_prompt_length, None, dict(chat_template_kwargs or {}), ranked_pairs,
        streaming, *(() if of_prompts == WHOLE else of_prompts),
    )  # fmt: skip

    def job() -> Job:
        found, its_form = _opened(source, limit, form) if streaming else (rows, form)
        processes = num_workers(workers, limit if streaming else len(rows))
        return Job(found, its_form, ranked_pairs, encoder, streaming, processes, of_prompts)

    folder = cache_folder(cache_dir) / content_key(rows, tokenizer, settings)
    return _open_or_make(job, folder, called, on_bad_row == "error", of_prompts)


class EmptyShare(UserError):
    """No pair of a source has its prompt in the part that was asked for."""


def _share(of_prompts: tuple[float, float]) -> str:
    """What log and errors call a part of the prompts; nothing for the whole."""
    if of_prompts == WHOLE:
        return ""
    use = "held out" if of_prompts[0] == 0 else "to train on"
    return f", the {100 * (of_prompts[1] - of_prompts[0]):.4g}% of prompts {use}"


# --- the work ------------------------------------------------------------------------------------------------------


def _opened(source: Source, limit: int | None, form: str) -> tuple[Iterator[Any], str]:
    """Open a stream of rows and tell their format."""
    rows = stream_source(source, limit)
    first = list(islice(rows, DETECTION_ROWS))
    if not first:
        raise UserError(f"{source.path}: has no rows; name another source or split")
    return chain(first, rows), detect_format(first, source.path) if form == "auto" else form


def _open_or_make(
    job: Callable[[], Job], folder: Path, source: str, stop_at_bad: bool, of_prompts: tuple[float, float]
) -> tuple[TokenizedPairs, DataReport]:
    try:
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            report = read_report(folder)
            if report is None:
                remove_leftovers(folder)
                report = _tokenize(job(), folder, source, stop_at_bad)
                publish(report, folder)
    except OSError as error:
        what = f"cannot write tokenised data to {folder.parent}: {error.strerror or error}"
        raise UserError(f"{what}; set data.cache_dir") from error
    report.source = source + _share(of_prompts)
    if stop_at_bad and report.first_bad:
        raise UserError(_refusal(source, report.first_bad))
    return TokenizedPairs(folder), report


def _tokenize(job: Job, folder: Path, source: str, stop_at_bad: bool) -> DataReport:
    """Tokenise all rows into the temporary folder of `folder` and count."""
    started, left_out = time.monotonic(), 0
    report = DataReport(format=job.form, max_length=job.encoder.max_length)
    draft = temporary(folder)
    draft.mkdir()
    try:
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        digest = xxhash.xxh3_128()
        with (
            open(draft / "tokens.bin", "wb") as tokens,
            open(draft / "unscored.bin", "wb") as unscored,
            open(draft / "texts.bin", "wb") as texts,
        ):
            for part in parts(job):
                left_out += part.left_out
                _count(report, part)
                if stop_at_bad and report.first_bad:
                    raise UserError(_refusal(source, report.first_bad))
                places = (np.array(part.unscored, dtype=np.int64) + tokens.tell() // 4).tobytes()
                tokens.write(part.tokens)
                unscored.write(places)
                digest.update(part.tokens)
                digest.update(places)
                texts.write(part.texts)
                for name, values in columns.items():
                    values += getattr(part, name)
        if not columns["lengths"]:
            kinds = ", ".join(f"{kind} {found.count:,}" for kind, found in report.kinds.items())
            first = f"; {report.first_bad}" if report.first_bad else ""
            if left_out:
                share = _share(job.of_prompts)
                raise EmptyShare(f"{source}{share}: none in {report.rows_read:,} rows; change data.validation_fraction")
            raise UserError(f"{source}: no usable row is left of {report.rows_read:,}: {kinds}{first}; fix the rows")
        for name, dtype in COLUMNS.items():
            np.save(draft / f"{name}.npy", np.array(columns[name], dtype=dtype))
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    digest.update(np.array(columns["lengths"], dtype=np.int64).tobytes())
    margins = np.array(columns["margins"], dtype=np.float32)
    if not np.isnan(margins).all():  # else the digest is that of the same pairs without ratings
        digest.update(margins.tobytes())
    report.digest, report.pairs = digest.hexdigest(), len(columns["lengths"])
    report.prompt_tokens, report.chosen_tokens, report.rejected_tokens = np.sum(columns["lengths"], axis=0).tolist()
    report.seconds = time.monotonic() - started
    return report


def _count(report: DataReport, part: Part) -> None:
    report.rows_read += part.rows_read
    for number, kind, detail, fate in part.oddities:
        report.kinds.setdefault(kind, KindCount()).add(number, fate, detail)
        if fate == "bad" and report.first_bad is None:
            report.first_bad = f"row {number}: {kind} ({detail})"
    report.prompts_cut += part.prompts_cut
    report.completions_cut += part.completions_cut


def _refusal(source: str, first_bad: str) -> str:
    return f"{source} {first_bad}; fix it, or drop such rows with --data.on_bad_row skip"


def _check_settings(form: str, on_bad_row: str, workers: int | None) -> None:
    for key, value, choices in (("data.format", form, FORMATS), ("data.on_bad_row", on_bad_row, ("error", "skip"))):
        if value not in choices:
            raise UserError(f"{key} '{value}': must be one of {', '.join(choices)}")
    if workers is not None and workers < 1:
        raise UserError(f"data.workers {workers}: must be 1 or more")
