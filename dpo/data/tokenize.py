"""Preference data -> token ids on disk: read, convert, encode, once per content and per node.

`prepare_pairs` is the door: source -> rows -> PreferenceRow -> ids. The result lies in a folder of the cache named by a
hash of everything it depends on (rows, tokenizer, template, lengths, code version) and is memory-mapped. It is written
under a temporary name and renamed, so a killed process leaves nothing half-written; a lock per key makes the processes
of a node do the work once. Bad rows are counted by kind, a row under each kind it has; dropped or refused.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from dpo.data.boundary import encode_prompt, read_chat_template
from dpo.data.encode import PairEncoder
from dpo.data.formats import BROKEN_UNICODE, FORMATS, convert, detect_format
from dpo.data.sources import Rows, load_source
from dpo.data.store import (
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
from dpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataReport", "KindCount", "TokenizedPairs", "encode_prompt", "prepare_pairs", "read_chat_template"]

CODE_VERSION = 1  # raise it with every change that gives other ids or other counts
DETECTION_ROWS = 100
ROWS_PER_TASK = 512
ROWS_PER_WORKER = 4096  # fewer rows are tokenised sooner than a process starts to pay
MAX_DEFAULT_WORKERS = 16

logger = logging.getLogger(__name__)


def prepare_pairs(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    subset: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    split: str | None = "train",
    format: str = "auto",
    limit: int | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    on_bad_row: str = "error",
    chat_template: str | None = None,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[TokenizedPairs, DataReport]:
    """Read and tokenise one split of preference data, or open it where this was done before.

    Lengths count the end tokens: "longer than max_length" is prompt + longer completion + end token > max_length.
    (On the HH-RLHF slices with GPT-2 and 1,024 the figures are the same with and without it.)

    Args:
        path, subset, data_dir, revision, split, limit: As for `sources.load_source`.
        tokenizer: The policy's tokenizer; not changed.
        format: "auto" (told from the first rows), "hh", "prompt" or "conversation".
        max_length: Most tokens of a prompt and one completion together, end token included, >= 2.
        max_prompt_length: In a pair that exceeds `max_length`, the prompt may lose its start down to this many tokens
            (a BOS stays) before the completions lose their ends. None: prompts are never cut, and a prompt of
            `max_length` tokens or more, which leaves no room for a completion, makes a bad row.
        on_bad_row: "error" stops at the first bad row, "skip" drops and counts them.
        chat_template: Template text or a file, in place of the tokenizer's own.
        workers: Processes that tokenise; None: one per 4,096 rows, no more than the CPUs, nor 16.
        cache_dir: Folder for tokenised data; None: dpo/tokenized in the user's cache folder (XDG_CACHE_HOME).
    Returns:
        The pairs, in row order, and what was found in the data.
    Raises:
        UserError: Anything wrong with the data or the settings; one line.
    """
    _check_settings(format, on_bad_row, workers)
    template = read_chat_template(chat_template) if chat_template else None
    rows = load_source(path, subset=subset, data_dir=data_dir, revision=revision, split=split, limit=limit)
    source = f"{path} [{split}]" if split and not Path(path).is_file() else str(path)
    form = detect_format(islice(rows, DETECTION_ROWS), str(path)) if format == "auto" else format
    # Before the key: probing the tokenizer also clears what earlier calls left in it (truncation, padding).
    encoder = PairEncoder(
        tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, chat_template=template
    )
    job = _Job(rows, form, encoder, source, on_bad_row == "error", _num_workers(workers, len(rows)))
    settings = (CODE_VERSION, form, max_length, max_prompt_length, template)
    return _open_or_make(job, cache_folder(cache_dir) / content_key(rows, tokenizer, settings))


# --- the work --------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """What a worker needs; it is inherited by fork, never pickled."""

    rows: Rows
    form: str
    encoder: PairEncoder
    source: str
    stop_at_bad: bool
    workers: int


@dataclass
class _Part:
    """What a worker makes of a range of rows."""

    tokens: bytes = b""
    texts: bytes = b""
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    row_numbers: list[int] = field(default_factory=list)
    text_sizes: list[int] = field(default_factory=list)
    oddities: list[tuple[int, str, str, bool]] = field(default_factory=list)  # row, kind, detail, bad
    prompts_cut: int = 0
    completions_cut: int = 0


_job: _Job | None = None  # set in the worker processes alone


def _start_worker(job: _Job) -> None:
    global _job
    _job = job


def _encode_range(bounds: tuple[int, int]) -> _Part:
    assert _job is not None
    return _encode_part(_job, *bounds)


def _encode_part(job: _Job, start: int, stop: int) -> _Part:
    part = _Part()
    found = [convert(job.rows[index], job.form, index + 1) for index in range(start, stop)]
    # A row with broken Unicode cannot be given to a tokenizer.
    usable = [row for row, problems in found if row and not any(p.kind == BROKEN_UNICODE for p in problems)]
    encoded = {row.row: pair for row, pair in zip(usable, job.encoder.encode_rows(usable), strict=True)}
    tokens, texts = [], []
    for number, (row, problems) in enumerate(found, start=start + 1):
        pair = encoded.get(number)
        bad = {problem.kind: problem.detail for problem in (problems + pair.problems if pair else problems)}
        part.oddities += [(number, kind, detail, True) for kind, detail in bad.items()]
        if pair:
            part.oddities += [(number, kind, detail, False) for kind, detail in pair.notes]
        if bad:
            continue
        assert row is not None and pair is not None, f"row {number} vanished"
        text = json.dumps([row.prompt, row.chosen, row.rejected]).encode()
        tokens.append(np.array(pair.prompt_ids + pair.chosen_ids + pair.rejected_ids, dtype=np.int32).tobytes())
        texts.append(text)
        part.text_sizes.append(len(text))
        part.lengths.append((len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)))
        part.row_numbers.append(number)
        part.prompts_cut += pair.prompt_cut
        part.completions_cut += pair.completions_cut
    part.tokens, part.texts = b"".join(tokens), b"".join(texts)
    return part


def _open_or_make(job: _Job, folder: Path) -> tuple[TokenizedPairs, DataReport]:
    try:
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            report = read_report(folder)
            if report is None:
                remove_leftovers(folder)
                report = _tokenize(job, folder)
                publish(report, folder)
    except OSError as error:
        raise UserError(f"cannot write tokenised data to {folder.parent}: {error.strerror or error}") from error
    report.source = job.source
    if job.stop_at_bad and report.first_bad:
        raise UserError(_refusal(job.source, report.first_bad))
    return TokenizedPairs(folder), report


def _tokenize(job: _Job, folder: Path) -> DataReport:
    """Tokenise all rows into the temporary folder of `folder` and count."""
    started = time.monotonic()
    logger.info("tokenising %s rows of %s, %d process(es)", f"{len(job.rows):,}", job.source, job.workers)
    report = DataReport(format=job.form, max_length=job.encoder.max_length, rows_read=len(job.rows))
    draft = temporary(folder)
    draft.mkdir()
    try:
        lengths, row_numbers, text_sizes = [], [], []
        with open(draft / "tokens.bin", "wb") as tokens, open(draft / "texts.bin", "wb") as texts:
            for part in _parts(job):
                _count(report, part)
                if job.stop_at_bad and report.first_bad:
                    raise UserError(_refusal(job.source, report.first_bad))
                tokens.write(part.tokens)
                texts.write(part.texts)
                lengths += part.lengths
                row_numbers += part.row_numbers
                text_sizes += part.text_sizes
        if not lengths:
            kinds = ", ".join(f"{kind} {found.count:,}" for kind, found in report.kinds.items())
            raise UserError(f"{job.source}: no usable row is left of {len(job.rows):,}: {kinds}")
        table = np.array(lengths, dtype=np.int64)
        np.save(draft / "lengths.npy", table)
        np.save(draft / "row_numbers.npy", np.array(row_numbers, dtype=np.int64))
        np.save(draft / "text_ends.npy", np.array(text_sizes, dtype=np.int64).cumsum())
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    report.pairs = len(table)
    report.prompt_tokens, report.chosen_tokens, report.rejected_tokens = (int(total) for total in table.sum(axis=0))
    report.seconds = time.monotonic() - started
    return report


def _parts(job: _Job) -> Iterator[_Part]:
    bounds = [(at, min(at + ROWS_PER_TASK, len(job.rows))) for at in range(0, len(job.rows), ROWS_PER_TASK)]
    with _serial_tokenizer():
        if job.workers == 1:
            for start, stop in bounds:
                yield _encode_part(job, start, stop)
            return
        # Fork: the rows and the tokenizer are there at once, and no worker imports anything. The workers touch no GPU.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(job.workers, mp_context=context, initializer=_start_worker, initargs=(job,))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                results = pool.map(_encode_range, bounds)
            yield from results
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenising process was killed, most likely for want of memory: use fewer (--data.workers 1)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _count(report: DataReport, part: _Part) -> None:
    for number, kind, detail, bad in part.oddities:
        report.kinds.setdefault(kind, KindCount()).add(number, bad)
        if bad and report.first_bad is None:
            report.first_bad = f"row {number}: {kind} ({detail})"
    report.prompts_cut += part.prompts_cut
    report.completions_cut += part.completions_cut


@contextmanager
def _serial_tokenizer() -> Iterator[None]:
    """Keep the tokenizer from starting threads: the processes are ours, and later forks would not survive them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _num_workers(workers: int | None, rows: int) -> int:
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    tasks = -(-rows // ROWS_PER_TASK)
    if workers is not None:
        return min(workers, tasks)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(rows // ROWS_PER_WORKER, cpus, MAX_DEFAULT_WORKERS))


def _refusal(source: str, first_bad: str) -> str:
    return f"{source} {first_bad}; mend it, or drop such rows with --data.on_bad_row skip"


def _check_settings(form: str, on_bad_row: str, workers: int | None) -> None:
    for key, value, choices in (("data.format", form, FORMATS), ("data.on_bad_row", on_bad_row, ("error", "skip"))):
        if value not in choices:
            raise UserError(f"{key} '{value}': must be one of {', '.join(choices)}")
    if workers is not None and workers < 1:
        raise UserError(f"data.workers {workers}: must be 1 or more")
