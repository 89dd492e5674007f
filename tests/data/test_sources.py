"""Sources: every way to name rows gives the same rows, and every way to get it wrong gives one clear line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dpo.errors import UserError
from tests.by_path import load_source, source_identity, splits_of, stream_source, validation_split_of

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}\u2028\u00e9", "rejected": f"r{i}"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def written(folder: Path, name: str) -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        return file
    content = json.dumps(ROWS, indent=1).encode() if ".json" in name and "jsonl" not in name else LINES
    if ".csv" in name:
        lines = ["\ufeffprompt,chosen,rejected", *(",".join(row.values()) for row in ROWS)]
        content = ("\r\n".join(lines) + "\r\n").encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


def refused(path: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_source(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, name)
    assert list(load_source(file)) == ROWS
    assert list(load_source(file, limit=2)) == ROWS[:2]
    assert list(load_source(file, limit=99, split="anything")) == ROWS
    assert splits_of(file) == [] and validation_split_of(file) is None


def test_json_holds_lines_or_a_list_whatever_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_bytes(b"\xef\xbb\xbf" + LINES)
    (tmp_path / "list.jsonl").write_text(json.dumps(ROWS))
    (tmp_path / "blank.jsonl").write_bytes(b"\n" + LINES.replace(b"}\n", b"}\r\n\r\n"))
    for name in ("lines.json", "list.jsonl", "blank.jsonl"):
        assert load_source(tmp_path / name) == ROWS


def test_saved_folders_are_read_with_and_without_splits(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([4])).save_to_disk(tmp_path / "two")
    assert list(load_source(tmp_path / "one", limit=3)) == ROWS[:3]
    assert list(load_source(tmp_path / "two")) == ROWS
    assert list(load_source(tmp_path / "two", split="test")) == ROWS[4:]
    assert validation_split_of(tmp_path / "one") is None
    assert validation_split_of(tmp_path / "two") == "test"
    assert splits_of(tmp_path / "two") == ["train", "test"]
    assert "no split 'dev'; it has train, test" in refused(tmp_path / "two", split="dev")
    assert "no split was named; it has train, test" in refused(tmp_path / "two", split=None)


def test_file_names_in_a_folder_tell_the_splits(tmp_path: Path) -> None:
    written(tmp_path, "train-00000-of-00002.parquet")
    written(tmp_path, "train-00001-of-00002.parquet")
    written(tmp_path, "my_dev.jsonl.gz")
    (tmp_path / "notes.csv").write_text("not data")
    written(tmp_path, "test_prefs-00000-of-00001.parquet")
    (tmp_path / "test").mkdir()
    written(tmp_path / "test", "rows.json")
    assert list(load_source(tmp_path)) == ROWS + ROWS
    assert list(load_source(tmp_path, limit=7)) == ROWS + ROWS[:2]
    assert splits_of(tmp_path) == ["validation", "test_prefs", "train", "test"]
    assert validation_split_of(tmp_path) == "validation"
    assert list(load_source(tmp_path, data_dir="test")) == ROWS


def test_a_folder_of_nameless_files_is_train_in_order_of_names(tmp_path: Path) -> None:
    written(tmp_path, "b.jsonl")
    written(tmp_path, "c.parquet")
    (tmp_path / "a.jsonl").write_text('{"prompt": "first"}\n')
    prompts = [row["prompt"] for row in load_source(tmp_path, limit=8)]
    assert prompts == ["first", "p0", "p1", "p2", "p3", "p4", "p0", "p1"]
    assert list(load_source(tmp_path, split=None, limit=1)) == [{"prompt": "first"}]


def test_the_builtin_world_has_two_splits() -> None:
    train, validation = load_source("builtin:world", limit=3), load_source("builtin:world", split="validation")
    assert len(train) == 3 and len(validation) > 64 and set(train[0]) >= {"chosen", "rejected"}
    assert validation_split_of("builtin:world") == "validation"
    assert "no split 'test'; it has train, validation" in refused("builtin:world", split="test")
    assert "one built-in data set, 'builtin:world'" in refused("builtin:word")
    with pytest.raises(UserError, match="one built-in data set"):
        splits_of("builtin:word")


def test_a_broken_line_is_named_by_its_row(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0])] * 20
    lines[16] = '{"chosen": "x", '
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(lines))
    assert "train.jsonl row 17: not valid JSON: " in refused(file)
    assert len(load_source(file, limit=16)) == 16
    file.write_text(json.dumps(ROWS[0]) + "\n[1, 2]\n")
    assert "train.jsonl row 2: must be a JSON object with a key per column, got list" in refused(file)
    file.write_text(json.dumps({"data": ROWS}, indent=1))
    assert "train.jsonl: holds one JSON object over several lines; a list of rows, or one object" in refused(file)
    file.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"a": "\xff"}\n')
    assert "train.jsonl row 2: not UTF-8 text" in refused(file)


def test_a_broken_list_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"a": 1}, ')
    assert "a.json: not valid JSON: " in refused(file)
    file.write_bytes(b'[{"a": "\xff"}]')
    assert "a.json: not UTF-8 text" in refused(file)
    file.write_text('[{"a": 1}, "b"]')
    assert "a.json row 2: must be a JSON object" in refused(file)
    file.write_text("[]")
    assert "has no rows" in refused(file)


def test_a_table_keeps_texts_as_they_stand_and_reads_votes_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'prompt,response1,response2,annotator1,annotator2\n"a, ""b""\r\n\nc", 4,5 ,1,\n\n7,,x,2,0\n')
    first = {"prompt": 'a, "b"\r\n\nc', "response1": " 4", "response2": "5 ", "annotator1": 1, "annotator2": None}
    second = {"prompt": "7", "response1": "", "response2": "x", "annotator1": 2, "annotator2": 0}
    assert load_source(file) == [first, second] == list(stream_source(file))


def test_a_folder_of_tables_is_data_and_a_table_beside_data_is_not(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        written(tmp_path, name)
    assert load_source(tmp_path) == ROWS and validation_split_of(tmp_path) == "test"
    written(tmp_path, "other.jsonl")
    assert load_source(tmp_path) == ROWS and splits_of(tmp_path) == ["train"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "its first line names the columns ; give at least two"), (b"a,a\n1,2\n", "names the columns a, a; give"),
        (b"a,b\n1,2\n1,2,3\n", "row 2: 3 cells for 2 columns; fix it"), (b"a,b\n", "has no rows"),
        (b'a,b\n1,"2"3\n', "row 1: not valid CSV: "), (b'a,b\n1,"2\n', "row 1: not valid CSV: "),
        (b"a,b\n1,\xff\n", "not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_one_line(content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert line in refused(tmp_path / "a.csv")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(LINES)
    assert "a.jsonl.gz: not a whole gzip file" in refused(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES)[:-12])
    assert "b.jsonl.gz: not a whole gzip file" in refused(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.parquet").write_bytes(LINES)
    assert "c.parquet: not a readable parquet file" in refused(tmp_path / "c.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "not a whole folder of datasets.save_to_disk" in refused(tmp_path / "saved")


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "absent.jsonl")
    assert "no such file or folder" in refused("./absent/folder")
    assert "no such file or folder" in refused("data/absent.jsonl")
    (tmp_path / "empty").mkdir()
    assert "a folder without data; it should hold .jsonl, " in refused(tmp_path / "empty")
    (tmp_path / "empty.jsonl").write_text(" \n\n")
    assert "empty.jsonl: the file is empty" in refused(tmp_path / "empty.jsonl")
    (tmp_path / "a.txt").write_text("a,b")
    assert "a.txt': unknown kind of file; use one of .jsonl, " in refused(tmp_path / "a.txt")
    pyarrow.parquet.write_table(pyarrow.table({"chosen": []}), tmp_path / "none.parquet")
    assert "none.parquet: split 'train' has no rows" in refused(tmp_path / "none.parquet")


def test_settings_that_make_no_sense_are_one_line(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl")
    assert "got 0, must be 1 or more" in refused(file, limit=0)
    assert "data.subset 'x': " in refused(file, subset="x")
    assert "no such file or folder" in refused(tmp_path, data_dir="absent")
    assert "there is no split 'foo'; it has train" in refused(tmp_path, split="foo")


def test_the_hub_gets_subset_folder_revision_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return data[options["split"]] if options.get("split") else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # else it is asked for the splits, five times
    place: dict[str, Any] = {"subset": "s", "data_dir": "d", "revision": "v"}
    assert list(load_source("owner/name", **place, limit=2)) == ROWS[:2]
    assert asked == [("owner/name", {"name": "s", "data_dir": "d", "revision": "v", "split": "train"})]
    assert validation_split_of("owner/name", **place) == "test"
    assert "no split was named; it has train, test" in refused("owner/name", split=None)


def test_a_hub_that_cannot_be_reached_names_the_offline_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    message = refused("no-such-owner/no-such-name")
    assert "no such file or folder here, and the hub cannot be reached" in message
    assert "--prepare_only" in message and "HF_HOME" in message and "HF_HUB_OFFLINE=1" in message
    with pytest.raises(UserError, match="the hub cannot be reached"):
        validation_split_of("no-such-owner/no-such-name")


def test_what_the_hub_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Any:
        def load(path: str, **options: Any) -> Any:
            raise error

        return load

    monkeypatch.setattr(datasets, "load_dataset", failing(datasets.exceptions.DatasetNotFoundError("No x\non hub")))
    assert "data 'a/b': neither a file or folder here nor on the hub (No x)" in refused("a/b")
    monkeypatch.setattr(datasets, "load_dataset", failing(ValueError("Unknown split 'x'. Should be one of ['train']")))
    assert "data 'a/b': cannot load it from the hub: Unknown split 'x'. Should be" in refused("a/b", split="x")


def test_the_real_slices_are_one_source_with_two_splits(shared_data: Path) -> None:
    assert len(load_source(shared_data / "hh-rlhf")) == 4586
    assert len(load_source(shared_data / "hh-rlhf", split="validation")) == 1966
    assert validation_split_of(shared_data / "hh-rlhf") == "validation"


def test_a_stream_gives_the_rows_of_every_kind_of_source_in_order(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"):
        (tmp_path / name[2:]).mkdir()
        assert list(stream_source(written(tmp_path / name[2:], name))) == ROWS
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("b.parquet", "a.jsonl", "test.jsonl"):
        written(folder, name)
    assert list(stream_source(folder, limit=7)) == ROWS + ROWS[:2]
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    assert list(stream_source(tmp_path / "saved", limit=3)) == ROWS[:3]
    assert list(stream_source("builtin:world", limit=3)) == list(load_source("builtin:world", limit=3))


def test_the_hub_is_streamed_and_its_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def rows() -> Any:
        yield from ROWS[:3]
        raise OSError("connection lost")

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    place: dict[str, Any] = {"subset": "s", "data_dir": "d", "revision": "v", "split": "test"}
    assert list(stream_source("owner/name", **place, limit=3)) == ROWS[:3]
    as_asked = {"name": "s", "data_dir": "d", "revision": "v", "split": "test", "streaming": True}
    assert asked == [("owner/name", as_asked)]
    with pytest.raises(UserError, match="data 'owner/name': no such file .* the hub cannot be reached"):
        list(stream_source("owner/name", **place))


def test_a_stream_is_known_by_place_size_and_time(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl")
    known = source_identity(file, limit=3)
    assert source_identity(file, limit=3) == known != source_identity(file, limit=4)
    os.utime(file, ns=(0, 0))
    assert source_identity(file, limit=3) != known
    assert source_identity("owner/name", revision="a") != source_identity("owner/name", revision="b")
    with pytest.raises(UserError, match="no such file"):
        source_identity(tmp_path / "absent.jsonl")
