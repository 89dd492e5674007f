"""docs/data.md is true: its rows are read, its recipe runs, its commands too, and a streamed run is as any other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import train_dpo
from dpo.__main__ import main
from dpo.data import encode
from dpo.data.formats import FORMATS, detect_format
from dpo.data.kinds import LOWER, TIE
from dpo.data.labels import read_row
from dpo.runtime.files import read_records
from dpo.runtime.tracking import read_lines

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/data.md")}


def rows_of_the_guide() -> dict[str, dict[str, Any]]:
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", GUIDE, re.MULTILINE)
    return {name: json.loads(row) for name, row in rows}


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def files(folder: Path, *names: str) -> None:
    """Files of plain rows, a different prompt in each."""
    for name in names:
        rows = [rows_of_the_guide()["prompt"] | {"prompt": f"{name}: {i} + 2?\nAnswer:"} for i in range(8)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_rows_shown_are_read_in_the_format_they_stand_for():
    rows = rows_of_the_guide()
    assert set(rows) == set(FORMATS) - {"auto"}
    for form, row in rows.items():
        assert detect_format([row]) == form
        ((preference, odd),) = read_row(row, form, 1)
        assert preference is not None and odd == []
        assert preference.margin == {"ranked": 4.0, "votes": pytest.approx(2 / 3)}.get(form)


def test_the_kinds_that_are_kept_are_listed():
    (listed,) = re.findall(r"^\| kept \| (.*) \|$", GUIDE, re.MULTILINE)
    for kind in (LOWER, encode.SPACE_AT_END, encode.RUN_TOGETHER, encode.MERGES, encode.UNEVEN_START):
        assert kind in listed
    assert f"| no pair, and no error | {TIE} |" in GUIDE


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_audit_command_runs(document, tmp_path, monkeypatch, tiny_policy, capsys):
    commands = [line for block in fences(DOCUMENTS[document], "bash") for line in block.splitlines() if "audit" in line]
    assert len(commands) == 1
    words = shlex.split(commands[0])
    assert words[:4] == ["python", "-m", "dpo", "audit"] and "gpt2" in words
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    files(tmp_path, "my_pairs.jsonl", "my_validation.jsonl")
    assert main([str(tiny_policy) if word == "gpt2" else word for word in words[3:]]) == 0
    assert "what a reward accuracy must beat" in capsys.readouterr().out
    assert (tmp_path / "audit.json").exists() is ("--json" in words)


def run(folder: Path, name: str, *arguments: str) -> list[dict[str, Any]]:
    settings = ["--model.policy", "builtin:tiny", "--data.cache_dir", str(folder / "cache"), "--train.max_steps", "2",
                "--train.global_batch_size", "4", "--log.samples", "0", "--train.output_dir", str(folder / name)]
    assert train_dpo.main(["--config", str(ROOT / "ds_configs/zero2.json"), *settings, *arguments]) == 0
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(folder / name)]


def test_the_recipe_of_several_sources_trains_with_the_shares_and_names_it_states(tmp_path, monkeypatch, capsys):
    (recipe,) = [block for block in fences(GUIDE, "yaml") if "weight" in block]
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    files(tmp_path, *(source["path"] for part in yaml.safe_load(recipe)["data"].values() for source in part))
    lines = run(tmp_path, "run", "--recipe", "recipe.yaml")
    printed = capsys.readouterr().err
    assert "my_pairs.jsonl: 12 pairs an epoch, 75.0% of the pairs" in printed
    assert "my_other_pairs.jsonl: 4 pairs an epoch, 25.0% of the pairs" in printed
    assert {"eval_loss", "eval_mine_loss", "eval_other_loss"} <= set(lines[0]) and "`eval_mine_loss`" in GUIDE


def test_a_streamed_run_is_as_any_other_and_stops_reading_at_the_limit(tmp_path):
    files(tmp_path, "rows.jsonl")
    whole = tmp_path / "rows.jsonl"
    (tmp_path / "endless.jsonl").write_text(whole.read_text() + "this is never read\n" * 600)
    data = ["--data.train_limit", "8", "--optim.lr", "1e-3", "--optim.warmup_steps", "0"]
    expected = run(tmp_path, "whole", "--data.train", str(whole), *data)
    endless = ["--data.train", str(tmp_path / "endless.jsonl"), "--data.streaming", "true"]
    streamed = run(tmp_path, "streamed", *endless, *data)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]  # the other way round: all of them go wrong
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    held = ["--data.validation", str(tmp_path / "held.jsonl"), *endless]
    assert [line["loss"] for line in run(tmp_path, "held", *held, *data) if "loss" in line] == [
        line["loss"] for line in expected
    ]
    worst = read_records(tmp_path / "held" / "worst_pairs.jsonl")[0]
    assert sorted(row["origin"] for row in worst) == [f"row {i}" for i in range(1, 9)]
    assert all(row["prompt"] == swapped[int(row["origin"].split()[1]) - 1]["prompt"] for row in worst)
    assert streamed == expected and expected[-1]["loss"] != pytest.approx(expected[0]["loss"], abs=1e-6)
