"""Odd data files, folders and chat templates, as hypothesis strategies; and all kinds of odd input together."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from benchmarks.mutations import (
    DATA,
    TEMPLATE,
    USUAL,
    Case,
    damaged,
    deepspeed_json,
    flags,
    lines_of,
    mutated,
    nested,
    paths_of,
    plain_row,
    recipes,
    texts,
    values,
)

FORMS = ("prompt", "hh", "conversation", "ranked", "votes")
deep = st.sampled_from([nested(50), nested(300), nested(300, "{"), nested(930), nested(940), nested(950), nested(960)])



def row_of(form: str, index: int) -> dict[str, Any]:
    """A good row of a format."""
    row = plain_row(index)
    if form == "hh":
        start = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
        return {side: start + row[side] for side in ("chosen", "rejected")}
    if form == "conversation":
        made: dict[str, Any] = {"prompt": [{"role": "user", "content": row["prompt"]}]}
        return made | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    if form == "ranked":
        return {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "scores": [2, 1.5]}
    if form == "votes":
        return {"prompt": row["prompt"], "response1": row["chosen"], "response2": row["rejected"], "label": 1}
    return row


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, list[Any]]:
    """Rows of one format; one to three of them are odd."""
    form = draw(st.sampled_from(FORMS))
    made: list[Any] = [row_of(form, i) for i in range(draw(st.integers(1, 5)))]
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        at = draw(st.integers(0, len(made) - 1))
        row = made[at]
        if not isinstance(row, dict) or draw(st.integers(0, 8)) == 0:
            made[at] = draw(st.one_of(values, deep))
            continue
        paths = paths_of(row)
        if not paths:
            continue
        changes = st.one_of(values, texts, st.sampled_from([row_of(f, 1)["chosen"] for f in FORMS[:3]]), deep)
        if draw(st.integers(0, 60)) == 0:
            changes = st.just("word " * 200_000)
        made[at] = draw(mutated(row, paths, changes))
    return form, made


def _json_text(made: list[Any], layout: str) -> bytes:
    """Rows as JSON; deep ones are written by hand, as json.dumps would not."""
    items = []
    for row in made:
        try:
            items.append(json.dumps(row))
        except RecursionError:
            items.append(json.dumps(str(type(row))))
    if layout == "list":
        return f"[{', '.join(items)}]".encode()
    return "".join(item + "\n" for item in items).encode()


def _parquet(made: list[Any]) -> bytes | None:
    """Rows as parquet, where Arrow can say them."""
    buffer = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist([row for row in made if isinstance(row, dict)])
        pyarrow.parquet.write_table(table, buffer)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, RecursionError):
        return None
    return buffer.getvalue()


@st.composite
def data_files(draw: st.DrawFn) -> Case:
    """One data file, its rows or its bytes odd."""
    form, made = draw(rows())
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet"]))
    name = draw(st.sampled_from(["train", "train", "d\u00e4t\u00e4", "new\nline", "esc\x1b[31m", "a b",
    "test"])) + suffix
    content = _parquet(made) if suffix == ".parquet" else None
    if content is None:
        layout = draw(st.sampled_from(["lines", "lines", "list"]))
        content = draw(damaged(_json_text(made, layout)))
        if draw(st.integers(0, 6)) == 0:
            content = _doubled_keys(content)
    if suffix.endswith(".gz"):
        zipped = gzip.compress(content, mtime=0)
        how = draw(st.sampled_from(["", "", "", "cut", "twice", "plain", "tail", "flip"]))
        content = {
            "": zipped, "cut": zipped[: len(zipped) // 2], "twice": gzip.compress(zipped, mtime=0), "plain": content,
            "tail": zipped + b"junk", "flip": zipped[:-6] + bytes([zipped[-6] ^ 255]) + zipped[-5:],
        }[how]  # fmt: skip
    elif suffix == ".parquet" and draw(st.integers(0, 3)) == 0:
        content = draw(damaged(content))
    argv = [*USUAL, "--data.train", name]
    if form == "conversation" and draw(st.integers(0, 5)):
        argv += ["--model.chat_template", TEMPLATE]
    if draw(st.integers(0, 2)) == 0:
        argv += ["--data.on_bad_row", "skip"]
    if draw(st.integers(0, 3)) == 0:
        argv += ["--data.format", draw(st.sampled_from(["auto", *FORMS]))]
    if draw(st.integers(0, 3)) == 0:
        argv += ["--data.streaming", "true"]
    if draw(st.integers(0, 3)) == 0:
        argv += ["--data.max_length", draw(st.sampled_from(["2", "3", "8", "128", "129"]))]
    return Case("data file", tuple(argv), {name: content})


def _doubled_keys(content: bytes) -> bytes:
    return re.sub(rb'"chosen": ("[^"]*")', rb'"chosen": \1, "chosen": "other"', content, count=1)


@st.composite
def parquet_columns(draw: st.DrawFn) -> Case:
    """A parquet file with columns of other types, doubled columns, or other schemas in each of two files."""
    kinds: list[Any] = [
        pyarrow.array(["a", None, "b"]), pyarrow.array([1, 2, 3]), pyarrow.array([b"\xff", b"x", b""]),
        pyarrow.array([None, None, None]), pyarrow.array(["a", "b", "c"]).dictionary_encode(),
        pyarrow.array([["a"], [], None]), pyarrow.array([{"role": "user", "content": "x"}] * 3),
        pyarrow.array([1, 2, 3], pyarrow.timestamp("ns", "UTC")), pyarrow.array([1, 2, 3], pyarrow.duration("s")),
        pyarrow.array([0, 10**18, 2**62], pyarrow.timestamp("s")), pyarrow.array([[("k", 1)], [], []],
        pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array([True, False, None]), pyarrow.array(["x", "y", "z"], pyarrow.large_string()),
        pyarrow.array([1.5, float("nan"), float("inf")], pyarrow.float16()), pyarrow.array([], pyarrow.string()),
        pyarrow.array([{"bytes": None, "path": "/etc/passwd"}] * 3), pyarrow.array([1, 2, 3], pyarrow.decimal128(5, 2)),
        pyarrow.array(["a", "b", "c"], pyarrow.string_view()), pyarrow.array([1, 2, 3], pyarrow.time64("ns")),
    ]  # fmt: skip
    files: dict[str, bytes | str | None] = {}
    folder = draw(st.booleans())
    for index in range(draw(st.integers(1, 2)) if folder else 1):
        names = draw(st.lists(st.sampled_from(["prompt", "chosen", "rejected", "chosen", "", "x\x00", "id"]),
        max_size=5))
        arrays = [draw(st.sampled_from(kinds)) for _ in names]
        arrays = [a for a in arrays if len(a) == (len(arrays[0]) if arrays else 0)]
        schema = pyarrow.schema([(name, array.type) for name, array in zip(names, arrays, strict=False)])
        if draw(st.booleans()):
            features = {name: {"_type": draw(st.sampled_from(["Image", "Audio", "Video", "ClassLabel",
            "Nope"]))} for name in names}
            schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        buffer = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), buffer)
        except (pyarrow.ArrowException, ValueError):
            buffer = io.BytesIO(b"PAR1")
        files[f"{'data/' if folder else ''}train-{index}.parquet"] = buffer.getvalue()
    return Case("parquet", (*USUAL, "--data.train", "data" if folder else "train-0.parquet"), files)


ODD_FILES: list[bytes | str | None] = [
    b"", DATA, DATA[:-9], b"\x00" * 100, b"PK\x03\x04", b"[]", b"{}", b"null", gzip.compress(DATA, mtime=0), None,
    "loop", ".", "nowhere",
    "/dev/null", lines_of([{"a": 1}]), b'{"_data_files": [{"filename": "../../x"}]}', b'{"splits": ["train"]}',
    b"[[1]]",
]  # fmt: skip
ODD_NAMES = [
    "train.jsonl", "a/train.jsonl", "b/test.json", "x.parquet", "x.jsonl.gz", ".hidden.jsonl", "state.json",
    "dataset_dict.json",
    "dataset_info.json", "validation.jsonl", "loop", "train-00000-of-00002.jsonl", "README.md", "w\nx.jsonl",
    "\u202egnp.jsonl", "d.jsonl",
]  # fmt: skip


@st.composite
def folders(draw: st.DrawFn) -> Case:
    """A folder of odd files: empty, linked in circles, half saved by `datasets`."""
    names = draw(st.lists(st.sampled_from(ODD_NAMES), max_size=4, unique=True))
    files: dict[str, bytes | str | None] = {"data": None}
    files |= {f"data/{name}": draw(st.sampled_from(ODD_FILES)) for name in names}
    argv = [*USUAL, "--data.train", "data"]
    key = draw(st.sampled_from(["", "", "data.data_dir", "data.train_split", "data.validation_split",
    "data.validation", "data.subset"]))
    if key:
        argv += [f"--{key}", draw(st.one_of(texts, st.sampled_from(["data", "test", "a", "..", "data/train.jsonl"])))]
    return Case("folder", tuple(argv), files)


ODD_TEMPLATES = [
    "{{", "{% for", "{{ raise_exception('a\\nb') }}", "{{ 1 / 0 }}", "{{ messages[9].content }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}", "{% for i in range(10**9) %}x{% endfor %}", "{{ messages }}", "{{ x.y.z }}",
    "{{ '' }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson }}", TEMPLATE.replace("<|im_end|>", ""),
    TEMPLATE + "{{ 3 }}",
    "{{ strftime_now('%Y') }}", "{{ '\x00' }}", "{{ '\\ud800' }}", "{{ bos_token * 99 }}",
    TEMPLATE.replace("m.content", "m.content[:1]"),
    "{% generation %}{{ messages[0].content }}", "{{ messages[0].content.encode('utf-16') }}",
    "{{ undefined_function() }}",
]  # fmt: skip


@st.composite
def templates(draw: st.DrawFn) -> Case:
    """Conversations under an odd chat template, given as text or as a file."""
    content = lines_of([row_of("conversation", i) for i in range(3)])
    template = draw(st.one_of(st.sampled_from(ODD_TEMPLATES),
    st.sampled_from(ODD_TEMPLATES).map(lambda t: t + TEMPLATE), texts))
    files: dict[str, bytes | str | None] = {"train.jsonl": content}
    argv = [*USUAL, "--model.chat_template", template]
    if draw(st.booleans()):
        files["t.jinja"] = draw(damaged(template.encode("utf-8", "surrogatepass")))
        argv[-1] = "t.jinja"
    return Case("template", tuple(argv), files)


cases: st.SearchStrategy[Case] = st.one_of(
    flags(), flags(), recipes(), recipes(), deepspeed_json(), deepspeed_json(), data_files(), data_files(),
    data_files(),
    parquet_columns(), folders(), templates(), templates(),
)  # fmt: skip


def for_a_shell(case: Case) -> bool:
    """Whether an operating system can hand on the arguments of a case."""
    try:
        return all("\x00" not in arg and len(os.fsencode(arg)) < 100_000 for arg in case.argv)
    except UnicodeEncodeError:
        return False
