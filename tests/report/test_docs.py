"""docs/report.md is true: its commands and its Python run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.__main__ import main
from tests.report.runs import make_run

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("mine", "other"):
        make_run(tmp_path / "runs" / name, steps=4, pairs=8, samples=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(folder: Path, capsys: Any) -> None:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [words for words in map(shlex.split, lines) if words[0] != "deepspeed"]  # tests/test_docs_commands.py
    assert len(commands) == 3 and all(words[:3] == ["python", "-m", "dpo"] for words in commands)
    for name in ("beta-0.1", "beta-0.3"):
        shutil.copytree(folder / "runs/mine", folder / "runs" / name)
    for words in commands:
        assert main(words[3:]) == 0
    assert capsys.readouterr().out.split() == ["runs/mine/report.html", "comparison.html", "betas.html"]
    assert (folder / "runs/mine/report.html").exists() and (folder / "comparison.html").exists()


def test_the_numbers_can_be_read_without_this_program(folder: Path) -> None:
    (code,) = blocks("python")
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["margins"].shape == (8,) and np.isfinite(found["margins"]).all()
