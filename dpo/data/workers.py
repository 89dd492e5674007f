"""Ranges of rows -> encoded parts, in order, in this process or in several.

Serves `tokenize.py`. What lies in memory is inherited by the workers and named by its numbers; streamed rows are
sent to them, a few tasks ahead of what is asked for.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from dpo.data.encode import LONGER, PROMPT_ALONE, EncodedPair, PairEncoder
from dpo.data.kinds import BROKEN_UNICODE, KEPT, TIE, content_of
from dpo.data.labels import read_row
from dpo.errors import UserError
from dpo.machine import available_cpus
from dpo.types import PreferenceRow

WHOLE = 0.0, 1.0
ROWS_PER_TASK = 512
ROWS_PER_WORKER = 4096  # fewer rows are tokenised sooner than a process starts to pay
MAX_DEFAULT_WORKERS = 16

Task = tuple[int, "int | list[Any]"]
"""Place of the first row, counted from 0, and the place behind the last; or the rows themselves."""


@dataclass
class Job:
    """What a worker needs; it is inherited by fork, never pickled.

    Attributes:
        rows: By number where they lie in memory; else an iterator, read in order once.
        form: Their format.
        ranked_pairs: See `labels.read_row`.
        encoder: Makes ids of text.
        streamed: Whether `rows` is an iterator; then of every range of rows the first pair alone keeps its text.
        workers: Processes.
        of_prompts: Which prompts are wanted: those whose hash lies in this part of [0, 1); rows that have none, since
            they are bad, are counted with the last part.
    """

    rows: Any
    form: str
    ranked_pairs: str
    encoder: PairEncoder
    streamed: bool
    workers: int
    of_prompts: tuple[float, float] = WHOLE


@dataclass
class Part:
    """What a worker makes of a range of rows.

    Attributes:
        rows_read: Rows of the range.
        tokens, texts: Of the pairs, end to end.
        lengths: Tokens of prompt, chosen, rejected.
        characters: Characters of chosen, rejected before truncation.
        row_numbers, margins, text_sizes, prompt_hashes: Of every pair.
        targets: Scored tokens of chosen, rejected.
        unscored: Which tokens of completions are not scored, counted from the first of the range.
        oddities: Row, kind, detail and fate ("bad", "tie", "cut", "kept") of whatever is odd, once a row and kind.
        prompts_cut, completions_cut: Pairs and completions that were truncated.
        left_out: Rows and pairs that belong to another part of the prompts.
    """

    rows_read: int = 0
    tokens: bytearray = field(default_factory=bytearray)
    texts: bytearray = field(default_factory=bytearray)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    characters: list[tuple[int, int]] = field(default_factory=list)
    row_numbers: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    text_sizes: list[int] = field(default_factory=list)
    prompt_hashes: list[int] = field(default_factory=list)
    targets: list[tuple[int, int]] = field(default_factory=list)
    unscored: list[int] = field(default_factory=list)
    oddities: list[tuple[int, str, str, str]] = field(default_factory=list)
    prompts_cut: int = 0
    completions_cut: int = 0
    left_out: int = 0

    def add(self, row: PreferenceRow, pair: EncodedPair, *, with_text: bool) -> None:
        """Take up a pair that is kept."""
        first, text = len(self.tokens) // 4, _text(row) if with_text else b""
        self.tokens += np.array(pair.prompt_ids + pair.chosen_ids + pair.rejected_ids, dtype=np.int32).tobytes()
        self.unscored += [first + place for place in pair.unscored]
        self.texts += text
        self.text_sizes.append(len(text))
        self.lengths.append((len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)))
        self.targets.append(pair.targets)
        self.characters.append((len(content_of(row.chosen)), len(content_of(row.rejected))))
        self.row_numbers.append(row.row)
        self.margins.append(np.nan if row.margin is None else row.margin)
        self.prompt_hashes.append(pair.prompt_hash)
        self.prompts_cut += pair.prompt_cut
        self.completions_cut += pair.completions_cut


_job: Job | None = None  # set in the worker processes alone


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the process that waits ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(task: Task) -> Part:
    assert _job is not None
    return encode_part(_job, task)


def fate_of(kind: str) -> str:
    """What becomes of a row of a kind that `formats` or `labels` found: "bad", "tie" or "kept"."""
    return "tie" if kind == TIE else "kept" if kind in KEPT else "bad"


def encode_part(job: Job, task: Task) -> Part:
    """Read, convert and encode a range of rows."""
    first, what = task
    rows = what if isinstance(what, list) else [job.rows[index] for index in range(first, what)]
    part = Part(rows_read=len(rows))
    low, high = (int(end * 2**64) for end in job.of_prompts)
    found = [
        (number, *one)
        for number, row in enumerate(rows, start=first + 1)
        for one in read_row(row, job.form, number, job.ranked_pairs)
    ]
    # A row with broken Unicode cannot be given to a tokenizer.
    usable = [row if row and not any(p.kind == BROKEN_UNICODE for p in odd) else None for _, row, odd in found]
    encoded = iter(job.encoder.encode_rows([row for row in usable if row]))
    oddities: dict[tuple[int, str], tuple[str, str]] = {}
    for (number, _, odd), row in zip(found, usable, strict=True):
        pair = next(encoded) if row else None
        if not low <= (pair.prompt_hash if pair and not pair.problems else 2**64 - 1) < high:
            part.left_out += 1
            continue
        fates = {p.kind: (p.detail, fate_of(p.kind)) for p in odd}
        if pair:
            notes = {p.kind: (p.detail, "cut" if p.kind in (LONGER, PROMPT_ALONE) else "kept") for p in pair.notes}
            fates |= notes | {p.kind: (p.detail, "bad") for p in pair.problems}
        for kind, what_of_it in fates.items():
            oddities.setdefault((number, kind), what_of_it)
        if row is None or pair is None or any(fate == "bad" for _, fate in fates.values()):
            continue
        part.add(row, pair, with_text=not job.streamed or not part.lengths)
    part.oddities = [(number, kind, detail, fate) for (number, kind), (detail, fate) in oddities.items()]
    return part


def _text(row: PreferenceRow) -> bytes:
    return json.dumps([row.prompt, row.chosen, row.rejected, row.tools, row.chat_template_kwargs]).encode()


def _tasks(job: Job) -> Iterator[Task]:
    if not job.streamed:
        count = len(job.rows)
        yield from ((at, min(at + ROWS_PER_TASK, count)) for at in range(0, count, ROWS_PER_TASK))
        return
    start = 0
    while rows := list(islice(job.rows, ROWS_PER_TASK)):
        yield start, rows
        start += len(rows)


def parts(job: Job) -> Iterator[Part]:
    """Encode all rows of a job, in order.

    Raises:
        UserError: The data cannot be read or encoded, or a worker was killed.
    """
    with _serial_tokenizer():
        if job.workers == 1:
            yield from (encode_part(job, task) for task in _tasks(job))
            return
        # Fork: the rows and the tokenizer are there at once, and no worker imports anything. The workers touch no GPU.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(job.workers, mp_context=context, initializer=_start_worker, initargs=(job,))
        try:
            yield from _in_order(pool, _tasks(job), ahead=4 * job.workers)
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenising process was killed, most likely for want of memory: use fewer (--data.workers 1)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, tasks: Iterable[Task], ahead: int) -> Iterator[Part]:
    """Results in the order of their tasks, no more than `ahead` of them begun before they are asked for."""
    begun: deque[Future[Part]] = deque()
    for task in tasks:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            begun.append(pool.submit(_work, task))
        if len(begun) == ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


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


def num_workers(workers: int | None, rows: int | None) -> int:
    """How many processes encode so many rows (None: unknown): as many as asked for, or one per 4,096."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    if workers is not None:
        return workers if rows is None else min(workers, -(-rows // ROWS_PER_TASK))
    most = min(available_cpus(), MAX_DEFAULT_WORKERS)
    return most if rows is None else max(1, min(rows // ROWS_PER_WORKER, most))
