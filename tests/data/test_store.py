"""The cache: a second call does no work, everything counts that should, and what is there is whole."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.data import tokenize
from dpo.data.encode import PairEncoder
from dpo.errors import UserError
from tests.by_path import prepare_pairs
from tests.data.tiny_tokenizers import CHATML, plain_rows, tokenizer_of, with_template, written


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PairEncoder, "encode_rows", fail)


def test_a_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tokenizer = written(tmp_path, plain_rows(5)), tokenizer_of("byte")
    pairs, report = prepare_pairs(file, tokenizer, cache_dir=tmp_path / "c")
    forbid_work(monkeypatch)
    moved = file.rename(tmp_path / "moved.jsonl")
    again, second = prepare_pairs(moved, tokenizer_of("byte"), cache_dir=tmp_path / "c")
    assert again.path == pairs.path and second.cache_hit and not report.cache_hit
    assert "moved.jsonl: 5 rows (prompt), 5 pairs kept, read from the cache" in second.lines()[0]
    tokenizer("x", truncation=True, max_length=3, padding="max_length")  # leaves its marks in the backend
    assert prepare_pairs(moved, tokenizer, cache_dir=tmp_path / "c")[1].cache_hit
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare_pairs(moved, tokenizer, max_length=99, cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 99}, {"max_prompt_length": 7}, {"limit": 2}, {"of_prompts": (0.0, 0.999)}, {"format": "hh"},
        {"tokenizer": tokenizer_of("pieces")}, {"tokenizer": tokenizer_of("byte", eos_token="<|im_end|>")},
        {"tokenizer": with_template(tokenizer_of("byte"), CHATML)},
        {"version": 0}, {"ranked_pairs": "best_each"},
        {"chat_template_kwargs": {"a": 1}}, {"streaming": True},
        {"row": {"prompt": "q", "chosen": "r", "rejected": "s"}},
    ],
)  # fmt: skip
def test_everything_the_ids_depend_on_is_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    rows = [{"prompt": "q", "chosen": f"\n\nAssistant: {i}", "rejected": "\n\nAssistant: no"} for i in range(3)]
    file, tokenizer = written(tmp_path, rows), tokenizer_of("byte")
    prepare_pairs(file, tokenizer, cache_dir=tmp_path / "c")
    assert prepare_pairs(file, tokenizer, cache_dir=tmp_path / "c")[1].cache_hit
    monkeypatch.setattr(tokenize, "CODE_VERSION", change.pop("version", tokenize.CODE_VERSION))
    file = written(tmp_path, [*rows[:-1], change.pop("row", rows[-1])])
    tokenizer = change.pop("tokenizer", tokenizer)
    assert not prepare_pairs(file, tokenizer, cache_dir=tmp_path / "c", **change)[1].cache_hit


def test_a_cache_made_by_skipping_does_not_hide_bad_rows(tmp_path: Path) -> None:
    file = written(tmp_path, [*plain_rows(2), {"prompt": "p", "chosen": "a", "rejected": "a"}])
    prepare_pairs(file, tokenizer_of("byte"), on_bad_row="skip", cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match="row 3: chosen == rejected"):
        prepare_pairs(file, tokenizer_of("byte"), on_bad_row="error", cache_dir=tmp_path / "c")


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    file, cache = written(tmp_path, plain_rows(5)), tmp_path / "c"
    killed = multiprocessing.get_context("fork").Process(target=_die_midway, args=(file, cache))
    killed.start()
    killed.join()
    assert killed.exitcode == 9 and len([entry for entry in cache.iterdir() if ".tmp-" in entry.name]) == 1
    pairs, report = prepare_pairs(file, tokenizer_of("byte"), cache_dir=cache)
    assert not report.cache_hit and len(pairs) == 5
    assert sorted(entry.name for entry in cache.iterdir()) == [pairs.path.name, f"{pairs.path.name}.lock"]


def _die_midway(file: Path, cache: Path) -> None:
    tokenize.publish = lambda *_: os._exit(9)  # type: ignore[assignment]
    prepare_pairs(file, tokenizer_of("byte"), cache_dir=cache)


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    file = written(tmp_path, plain_rows(5))
    pairs, _ = prepare_pairs(file, tokenizer_of("byte"), cache_dir=tmp_path / "c")
    with open(pairs.path / "tokens.bin", "r+b") as stream:
        stream.truncate(8)
    again, report = prepare_pairs(file, tokenizer_of("byte"), cache_dir=tmp_path / "c")
    assert not report.cache_hit and len(again[4].prompt_ids) > 0


def test_processes_that_come_together_do_the_work_once(tmp_path: Path) -> None:
    file = written(tmp_path, plain_rows(2000))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    crowd = [context.Process(target=_prepare, args=(file, tmp_path / "c", answers)) for _ in range(3)]
    for process in crowd:
        process.start()
    hits = [answers.get(timeout=60) for _ in crowd]
    for process in crowd:
        process.join()
    assert sorted(hits) == [False, True, True]


def _prepare(file: Path, cache: Path, answers: Any) -> None:
    answers.put(prepare_pairs(file, tokenizer_of("byte"), workers=1, cache_dir=cache)[1].cache_hit)


def test_another_machine_may_publish_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, plain_rows(3))
    pairs, _ = prepare_pairs(file, tokenizer_of("byte"), cache_dir=tmp_path / "c")
    monkeypatch.setattr(tokenize, "read_report", lambda folder: None)
    monkeypatch.setattr(tokenize, "remove_leftovers", lambda folder: None)
    again, _ = prepare_pairs(file, tokenizer_of("byte"), cache_dir=tmp_path / "c")
    assert again.path == pairs.path and len(list((tmp_path / "c").iterdir())) == 2


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(UserError, match="cannot write tokenised data to .*: No space left on device"):
        prepare_pairs(written(tmp_path, plain_rows(3)), tokenizer_of("byte"), cache_dir=tmp_path / "c")
