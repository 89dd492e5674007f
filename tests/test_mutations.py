"""Odd input of every kind, through the functions that train_dpo.py calls: it works, or one line says what to fix."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.mutate import complaint, in_process, on_the_command_line, small_policy
from benchmarks.mutations import DATA, TEMPLATE, USUAL, Case, lines_of, nested, plain_row
from benchmarks.mutations_data import cases, row_of


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small model with turn tokens; off the hub for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setenv("DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield small_policy(tmp_path_factory.mktemp("policy"))


def test_odd_input_is_taken_or_refused_in_one_line_and_leaves_nothing(
    policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    results = set()

    @settings(
        max_examples=200, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases)
    def receive(case: Case) -> None:
        result, found = in_process(case, policy, tmp_path_factory.mktemp("case"))
        results.add(result)
        assert found is None, f"{case}: {found}"

    receive()
    assert {"works", "refused"} <= results <= {"works", "refused", "help"}  # else they might all see the same refusal


def one_file(name: str, content: bytes, *argv: str) -> Case:
    return Case("data file", (*USUAL, "--data.train", name, *argv), {name: content})


def deep(depth: int) -> bytes:
    return b'{"prompt": "x", "chosen": "y", "rejected": ' + b"[" * depth + b"]" * depth + b"}\n"


ROWS = {
    "a key given twice": (b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n', "given twice"),
    "deeper than the parser goes": (deep(100_000), "not valid JSON"),
    "as deep as the parser goes": (deep(900), "more than 50 levels"),
    "a number without end": (b'{"prompt": "a", "chosen": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
    "half a surrogate pair": (rb'{"prompt": "\ud800", "chosen": "b", "rejected": "c"}' + b"\n", "broken Unicode"),
    "a NUL": (rb'{"prompt": "a\u0000", "chosen": "b", "rejected": "c"}' + b"\n", "contains NUL"),
    "Latin-1": ('{"prompt": "\u00e9", "chosen": "b", "rejected": "c"}\n'.encode("latin-1"), "not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_an_odd_row_is_named_by_its_number(
    name: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, what = ROWS[name]
    result, found = in_process(one_file("d.jsonl", DATA + row), policy, tmp_path, show=True)
    assert (result, found) == ("refused", None)
    said = capsys.readouterr().out
    assert "d.jsonl row 7: " in said and what in said


def test_half_a_surrogate_pair_in_a_role_is_named_by_its_row(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row_of("conversation", i) for i in range(2)]
    rows[1]["prompt"] = [{"role": "user\ud800", "content": "x"}]
    case = one_file("d.jsonl", lines_of(rows), "--model.chat_template", TEMPLATE)
    assert in_process(case, policy, tmp_path, show=True) == ("refused", None)
    said = capsys.readouterr().out
    assert "d.jsonl row 2: chat template does not fit" in said and "surrogates not allowed" in said


@pytest.mark.parametrize(
    "wrapped", [DATA, gzip.compress(gzip.compress(DATA)), gzip.compress(DATA)[:-20]], ids=["plain", "twice", "cut"]
)  # a name with the bytes themselves holds the time, and two workers must have the same names
def test_what_is_no_whole_gzip_file_of_rows_is_refused_by_name(
    wrapped: bytes, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(one_file("d.jsonl.gz", wrapped), policy, tmp_path, show=True) == ("refused", None)
    assert "d.jsonl.gz" in capsys.readouterr().out


TEN_MEGABYTES = "word " * 2_000_000


@pytest.mark.parametrize(("more", "result"), [
    ({"notes": TEN_MEGABYTES}, "works"), ({"chosen": [TEN_MEGABYTES]}, "refused"), ({TEN_MEGABYTES: 1}, "works"),
    ({"prompt": TEN_MEGABYTES[:500_000]}, "works"),  # every character is a token here: the rest would take a minute
])  # fmt: skip
def test_a_row_of_ten_megabytes_is_like_any_other(
    more: dict[str, Any], result: str, policy: Path, tmp_path: Path
) -> None:
    rows = [plain_row(0), plain_row(1) | more]
    assert in_process(one_file("d.jsonl", lines_of(rows)), policy, tmp_path, limit=120) == (result, None)


def test_half_a_row_of_ten_megabytes_is_named_in_a_short_line(policy: Path, tmp_path: Path) -> None:
    content = lines_of([plain_row(0), plain_row(1) | {"prompt": TEN_MEGABYTES}])[:-9]
    assert in_process(one_file("d.jsonl", content), policy, tmp_path, limit=120) == ("refused", None)


def test_a_bad_file_leaves_nothing_that_a_corrected_one_would_meet(policy: Path, tmp_path: Path) -> None:
    """The cache is the same for all four starts, and so is the path."""
    rows = [plain_row(i) for i in range(4)]
    good, bad = lines_of(rows), lines_of([*rows[:3], {"prompt": "x"}])
    for content, result in ((bad, "refused"), (good[:-9], "refused"), (good, "works"), (bad, "refused")):
        assert in_process(one_file("d.jsonl", content), policy, tmp_path) == (result, None)
    assert in_process(one_file("d.jsonl", bad, "--data.on_bad_row", "skip"), policy, tmp_path) == ("works", None)


def test_the_check_itself_sees_tracebacks_and_leftovers(policy: Path, tmp_path: Path) -> None:
    case = one_file("d.jsonl", DATA)
    line = "train_dpo.py: d.jsonl row 1: not valid JSON; fix it\n"
    assert complaint(case, 2, "", line, tmp_path) is None
    assert complaint(case, 2, "", line + "more\n", tmp_path) is not None
    assert complaint(case, 2, "", line.replace("row", "\x1b[31mrow"), tmp_path) is not None
    assert complaint(case, 2, "", "train_dpo.py: something is wrong; fix it\n", tmp_path) is not None
    assert complaint(case, 2, "", line.replace("; fix it", ""), tmp_path) is not None
    assert complaint(case, 1, "", line, tmp_path) is not None
    (tmp_path / "run").mkdir()
    assert complaint(case, 2, "", line, tmp_path) is not None


def test_nested_text_reaches_the_command_line_as_one_line(policy: Path, tmp_path: Path) -> None:
    case = one_file("new\nline \x1b[31m.jsonl", lines_of([plain_row(0), nested(60)]))
    assert on_the_command_line(case, policy, tmp_path) == ("refused", None)
