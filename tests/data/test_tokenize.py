"""Tokenising a data set: pairs come back as they were, odd rows are counted by kind, real data by known figures."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from dpo.data.encode import PairEncoder
from dpo.data.store import COLUMNS
from dpo.data.workers import num_workers
from dpo.errors import UserError
from dpo.types import PreferenceRow
from tests.by_path import prepare_pairs
from tests.data.tiny_tokenizers import CHATML, chat, plain_rows, text_of, tokenizer_of, with_template, written


def test_pairs_come_back_with_their_texts(tmp_path: Path) -> None:
    rows = plain_rows(7)
    rows[2] = {"prompt": "x", "chosen": " \u00e9", "rejected": " \u00e9"}
    tokenizer = tokenizer_of("byte")
    pairs, report = prepare_pairs(written(tmp_path, rows), tokenizer, on_bad_row="skip", cache_dir=tmp_path / "c")
    assert len(pairs) == report.pairs == 6 and report.rows_read == 7 and report.format == "prompt"
    assert pairs.row_numbers.tolist() == [1, 2, 4, 5, 6, 7]
    assert pairs.lengths.dtype == pairs.row_numbers.dtype == np.int64
    for pair_id, row in enumerate(rows[:2] + rows[3:]):
        pair, texts = pairs[pair_id], pairs.texts(pair_id)
        assert (texts.prompt, texts.chosen, texts.rejected) == (row["prompt"], row["chosen"], row["rejected"])
        assert texts.row == pairs.row_numbers[pair_id] and pair.pair_id == pair_id
        parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        assert [len(part) for part in parts] == pairs.lengths[pair_id].tolist()
        assert [tokenizer.decode(part.tolist()) for part in parts] == [
            row["prompt"], row["chosen"] + "</s>", row["rejected"] + "</s>",
        ]  # fmt: skip
        assert all(part.dtype == np.int32 for part in parts)
    for out in (-1, 6):
        with pytest.raises(IndexError):
            pairs[out]
        with pytest.raises(IndexError):
            pairs.texts(out)
    assert pickle.loads(pickle.dumps(pairs)).texts(5) == pairs.texts(5)


def test_conversations_come_back_as_messages(tmp_path: Path) -> None:
    row = {"chosen": chat("Hi", "Yes"), "rejected": chat("Hi", "No")}
    tokenizer = with_template(tokenizer_of("byte"), CHATML)
    pairs, report = prepare_pairs(written(tmp_path, [row]), tokenizer, cache_dir=tmp_path / "c")
    assert pairs.texts(0) == PreferenceRow(chat("Hi"), chat("Hi", "Yes")[1:], chat("Hi", "No")[1:], 1)
    assert report.format == "conversation" and report.kinds == {}


def test_a_bad_row_stops_with_file_row_kind_and_remedy(tmp_path: Path) -> None:
    rows: list[Any] = plain_rows(600)
    rows[16], rows[550] = {"prompt": "x", "chosen": "y"}, {**rows[0], "chosen": 3}
    for workers in (1, 2):
        with pytest.raises(UserError) as caught:
            prepare_pairs(written(tmp_path, rows), tokenizer_of("byte"), workers=workers, cache_dir=tmp_path / "c")
        message = str(caught.value)
        assert "train.jsonl row 17: missing field ('rejected' is missing; the row has prompt, chosen); " in message
        assert message.endswith("--data.on_bad_row skip") and "\n" not in message
    assert [entry.suffix for entry in (tmp_path / "c").iterdir()] == [".lock"]


def test_skipped_rows_are_counted_under_every_kind_they_have(tmp_path: Path) -> None:
    rows: list[Any] = plain_rows(4) + [
        {"prompt": "p" * 30, "chosen": " ", "rejected": " "},
        {"prompt": "p", "chosen": "a", "rejected": None},
        {"prompt": "p", "chosen": "a" * 30, "rejected": "a\ud800"},
        {"prompt": "p", "chosen": "a" * 30, "rejected": "b"},
    ]
    _, report = prepare_pairs(
        written(tmp_path, rows), tokenizer_of("byte"), max_length=20, on_bad_row="skip", cache_dir=tmp_path / "c"
    )
    assert {kind: (found.count, found.rows, found.fate) for kind, found in report.kinds.items()} == {
        "empty response": (1, [5], "bad"),
        "chosen == rejected": (1, [5], "bad"),
        "prompt alone max_length or more": (1, [5], "bad"),
        "longer than max_length": (2, [5, 8], "cut"),
        "missing field": (1, [6], "bad"),
        "broken Unicode": (1, [7], "bad"),
        "prompt and completion run together": (1, [8], "kept"),
    }
    assert report.pairs == 5 and report.completions_cut == 1 and report.prompts_cut == 0
    lines = report.lines()
    assert "8 rows (prompt), 5 pairs kept, tokenised in" in lines[0]
    assert "  longer than max_length: 2, cut to 20 tokens where kept (row 5, 8)" in lines
    assert "  missing field: 1, refused or dropped (row 6)" in lines
    assert lines[-1] == "  truncated: prompts at their start: 0; completions at their end, with the end token: 1"


def test_at_most_three_rows_are_named(tmp_path: Path) -> None:
    rows = plain_rows(1) + [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 5
    file = written(tmp_path, rows)
    _, report = prepare_pairs(file, tokenizer_of("byte"), on_bad_row="skip", cache_dir=tmp_path / "c")
    assert "  chosen == rejected: 5, refused or dropped (row 2, 3, 4, ...)" in report.lines()


def test_no_row_left_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "a"}] * 2)
    with pytest.raises(UserError, match="no usable row is left of 2: chosen == rejected 2"):
        prepare_pairs(file, tokenizer_of("byte"), on_bad_row="skip", cache_dir=tmp_path / "c")


def test_parts_of_the_prompts_share_none_and_make_up_the_whole(tmp_path: Path) -> None:
    """Every prompt comes twice, once cut because its completions are long: both times it is on the same side."""
    rows = [{**row, "prompt": f"question {i // 2}: "} for i, row in enumerate(plain_rows(200))]
    for row in rows[::2]:
        row["chosen"] += " and so on" * 5
    file, tokenizer, sides = written(tmp_path, rows), tokenizer_of("byte"), []
    options: dict[str, Any] = {"max_length": 40, "max_prompt_length": 4, "cache_dir": tmp_path / "c"}
    for part in ((0.0, 0.2), (0.2, 1.0)):
        pairs, report = prepare_pairs(file, tokenizer, of_prompts=part, **options)
        assert not report.cache_hit and report.pairs == len(pairs) == len(pairs.lengths)
        assert report.prompts_cut == report.kinds["longer than max_length"].count == len(pairs) / 2
        sides.append(pairs.row_numbers.tolist())
    assert sorted(sides[0] + sides[1]) == list(range(1, 201)) and len(sides[0]) in range(20, 61)
    assert not {(row - 1) // 2 for row in sides[0]} & {(row - 1) // 2 for row in sides[1]}
    few, _ = prepare_pairs(file, tokenizer, of_prompts=(0.0, 0.2), limit=100, **options)
    assert few.row_numbers.tolist() == [row for row in sides[0] if row <= 100]


def test_every_odd_row_is_counted_on_one_side_of_the_prompts(tmp_path: Path) -> None:
    rows = [*plain_rows(60), {"prompt": "x", "chosen": "y"}, {"prompt": "p", "chosen": "", "rejected": " a"}]
    rows += [{"prompt": f"q{i} ", "chosen": "a", "rejected": " b"} for i in range(9)]
    file, counts, tokenizer = written(tmp_path, rows), [], tokenizer_of("byte")
    options: dict[str, Any] = {"on_bad_row": "skip", "cache_dir": tmp_path / "c"}
    for part in ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0)):
        report = prepare_pairs(file, tokenizer, of_prompts=part, **options)[1]
        counts.append({kind: found.count for kind, found in report.kinds.items()} | {"pairs": report.pairs})
    assert len(counts[2]) > 3
    assert all(counts[0].get(kind, 0) + counts[1].get(kind, 0) == count for kind, count in counts[2].items())


def test_a_share_without_a_pair_is_blamed_and_so_are_rows(tmp_path: Path) -> None:
    bad, tokenizer = {"prompt": "p", "chosen": "a", "rejected": "a"}, tokenizer_of("byte")
    options: dict[str, Any] = {"on_bad_row": "skip", "cache_dir": tmp_path / "c"}
    with pytest.raises(UserError, match=r"the 1e-07% of prompts held out: none in 41 rows; change data.val"):
        prepare_pairs(written(tmp_path, [*plain_rows(40), bad]), tokenizer, of_prompts=(0.0, 1e-9), **options)
    with pytest.raises(UserError, match=r"train.jsonl: no usable row is left of 2: chosen == rejected 2"):
        prepare_pairs(written(tmp_path, [bad, bad]), tokenizer, of_prompts=(0.001, 1.0), **options)


def test_one_process_and_several_make_the_same(tmp_path: Path) -> None:
    file, made = written(tmp_path, plain_rows(1100)), []
    for workers in (1, 3):
        pairs, report = prepare_pairs(file, tokenizer_of("byte"), workers=workers, cache_dir=tmp_path / str(workers))
        assert not report.cache_hit and pairs.row_numbers.tolist() == list(range(1, 1101))
        names = ("tokens.bin", "texts.bin", *(f"{name}.npy" for name in COLUMNS))
        made.append([(pairs.path / name).read_bytes() for name in names])
    assert made[0] == made[1]


def test_a_worker_count_is_chosen_by_size() -> None:
    cpus = len(os.sched_getaffinity(0))
    assert num_workers(None, 10) == 1 and num_workers(None, 10**7) == num_workers(None, None) == min(cpus, 16)
    assert num_workers(64, 1000) == 2 and num_workers(64, None) == 64


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, plain_rows(1))
    wrong: dict[str, tuple[Any, str]] = {
        "format": ("alpaca", "data.format 'alpaca': must be one of auto, hh, prompt, conversation"),
        "on_bad_row": ("drop", "data.on_bad_row 'drop': must be one of error, skip"),
        "workers": (0, "data.workers 0: must be 1 or more"),
        "cache_dir": (file / "x", "cannot make the cache folder"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(UserError, match=message):
            prepare_pairs(file, tokenizer_of("byte"), **{"cache_dir": tmp_path / "c", name: value})


def test_a_killed_worker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairEncoder, "encode_rows", lambda *_: os._exit(9))
    with pytest.raises(UserError, match="a tokenising process was killed, .*--data.workers 1"):
        prepare_pairs(written(tmp_path, plain_rows(600)), tokenizer_of("byte"), workers=2, cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    ("split", "expected"), [("train", (20, 7, 7, 1, 30, 15, 4536)), ("validation", (8, 0, 4, 1, 13, 8, 1946))]
)
def test_odd_rows_of_hh_are_counted(shared_data: Path, tmp_path: Path, split: str, expected: tuple[int, ...]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    pairs, report = prepare_pairs(
        shared_data / "hh-rlhf", tokenizer, split=split, max_length=1024, on_bad_row="skip", cache_dir=tmp_path
    )
    kinds = (
        "chosen == rejected", "empty response", "prompts differ", "completion holds a further Human turn",
        "longer than max_length", "prompt alone max_length or more",
    )  # fmt: skip
    counts = (report.kinds[kind].count if kind in report.kinds else 0 for kind in kinds)
    assert (*counts, len(pairs)) == expected
    assert {kind for kind, found in report.kinds.items() if found.fate == "kept"} == {"invisible character"}
    assert set(report.kinds) <= {*kinds, "invisible character"}
    assert report.completions_cut > 0 and report.source.endswith(f"hh-rlhf [{split}]")
    lengths = pairs.lengths
    assert lengths.min() >= 1 and (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max() == 1024
    end = tokenizer.eos_token_id
    for pair_id in range(0, len(pairs), 7):
        pair, texts = pairs[pair_id], pairs.texts(pair_id)
        assert pair.prompt_ids.tolist() == tokenizer(texts.prompt)["input_ids"]
        for ids, text in ((pair.chosen_ids, texts.chosen), (pair.rejected_ids, texts.rejected)):
            whole = tokenizer.decode([*pair.prompt_ids.tolist(), *ids.tolist()])
            if ids[-1] == end:
                assert whole == f"{texts.prompt}{text}<|endoftext|>" and ids.tolist().count(end) == 1
            else:
                assert len(pair.prompt_ids) + len(ids) == 1024
                assert f"{texts.prompt}{text}".startswith(whole[:-3])  # the cut may part a character


def test_hh_with_the_stories_tokenizer_decodes_to_the_text(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "stories260k-llama")
    pairs, _ = prepare_pairs(
        shared_data / "hh-rlhf/train.jsonl.gz", tokenizer, limit=300, max_length=20_000, on_bad_row="skip",
        cache_dir=tmp_path,
    )  # fmt: skip
    for pair_id in range(len(pairs)):
        pair, texts = pairs[pair_id], pairs.texts(pair_id)
        assert pair.prompt_ids.tolist() == tokenizer(texts.prompt)["input_ids"]
        ids = [*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()]
        assert text_of(tokenizer, ids) == f"{texts.prompt}{texts.chosen}"
        assert ids[0] == 1 and ids[-1] == 2 and ids.count(1) == ids.count(2) == 1


def test_real_conversations_end_with_the_end_of_turn(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    pairs, report = prepare_pairs(
        shared_data / "llamafactory-dpo-en-demo", with_template(tokenizer, CHATML), max_length=1024,
        max_prompt_length=512, cache_dir=tmp_path,
    )  # fmt: skip
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(pairs) == 300 and report.prompts_cut > 0 and set(report.kinds) == {
        "longer than max_length", "prompt alone max_length or more", "control character", "invisible character",
    }  # fmt: skip
    completions = [ids for i in range(300) for ids in (pairs[i].chosen_ids, pairs[i].rejected_ids)]
    assert sum(ids[-1] != end for ids in completions) == report.completions_cut > 0
    assert all((ids == end).sum() <= 1 for ids in completions)


def test_a_row_may_make_several_pairs_or_none_and_margins_are_kept(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say:", "completions": [" b", " a", " c\x07"], "scores": [1, 2, 0]},
        {"prompt": "Say:", "completions": [" b", " a"], "scores": [1, 1]},
        {"prompt": "Say:", "completions": [" b", " a"], "scores": [1.5, 1]},
    ]
    options: dict[str, Any] = {"ranked_pairs": "best_each", "cache_dir": tmp_path / "c"}
    pairs, report = prepare_pairs(written(tmp_path, rows), tokenizer_of("byte"), **options)
    assert report.format == "ranked" and (report.rows_read, report.pairs) == (3, 3)
    assert pairs.row_numbers.tolist() == [1, 1, 3]
    assert pairs.margins.tolist() == [pairs[i].margin for i in range(3)] == [1.0, 2.0, 0.5]
    assert [pairs.texts(i).rejected for i in range(3)] == [" b", " c\x07", " a"]
    found = {kind: (one.count, one.rows, one.fate, one.detail) for kind, one in report.kinds.items()}
    assert found == {
        "tie": (1, [2], "tie", "completions 1 and 2 have the score 1"),
        "control character": (1, [1], "kept", "U+0007 in rejected"),
    }
    assert "  tie: 1, no pair made (row 2)" in report.lines()
    plain, _ = prepare_pairs(written(tmp_path, plain_rows(2)), tokenizer_of("byte"), cache_dir=tmp_path / "c")
    assert np.isnan(plain.margins).all() and np.isnan(plain[0].margin)


def test_characters_are_those_of_the_whole_completions(tmp_path: Path) -> None:
    rows = [{"prompt": "Say:", "chosen": " \u00e9\u00e9" + "x" * 30, "rejected": " b"}]
    pairs, _ = prepare_pairs(written(tmp_path, rows), tokenizer_of("byte"), max_length=10, cache_dir=tmp_path / "c")
    assert pairs.characters.tolist() == [[33, 2]] and pairs.lengths[0, 1] < 10


@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_pairs_are_those_read_at_once_and_leave_a_text_in_512(tmp_path: Path, workers: int) -> None:
    rows = plain_rows(1300)
    file, tokenizer = written(tmp_path, rows), tokenizer_of("byte")
    whole, report = prepare_pairs(file, tokenizer, cache_dir=tmp_path / "c")
    streamed, other = prepare_pairs(file, tokenizer, streaming=True, workers=workers, cache_dir=tmp_path / "c")
    assert other.rows_read == report.rows_read == 1300 and other.format == "prompt" and other.kinds == report.kinds
    for name in ("tokens.bin", "lengths.npy", "row_numbers.npy", "margins.npy", "characters.npy"):
        assert (streamed.path / name).read_bytes() == (whole.path / name).read_bytes()
    kept = [i for i in range(1300) if streamed.texts(i) is not None]
    assert kept == [0, 512, 1024] and all(streamed.texts(i) == whole.texts(i) for i in kept)
    assert prepare_pairs(file, tokenizer, streaming=True, cache_dir=tmp_path / "c")[1].cache_hit
    file.write_text(file.read_text() + "\n")  # another size
    assert not prepare_pairs(file, tokenizer, streaming=True, cache_dir=tmp_path / "c")[1].cache_hit


def test_a_stream_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    file = written(tmp_path, plain_rows(5))
    file.write_text(file.read_text() + "no JSON\n")
    options: dict[str, Any] = {"streaming": True, "cache_dir": tmp_path / "c"}
    pairs, report = prepare_pairs(file, tokenizer_of("byte"), limit=5, **options)
    assert len(pairs) == report.rows_read == 5
    with pytest.raises(UserError, match="row 6: not valid JSON"):
        prepare_pairs(file, tokenizer_of("byte"), **options)
