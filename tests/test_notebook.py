"""The notebook runs from its first cell to its last at a tiny size, and shows that it trained."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from dpo.commandline import parse
from dpo.data import example
from dpo.runtime.tracking import read_lines

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "notebooks/gpt2_hh.ipynb"
PROMPT = "Is 1 < 2 & 2 < 3?"


@pytest.fixture(scope="module")
def book() -> Any:
    return nbformat.read(PATH, as_version=4)


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def values(source: str) -> dict[str, Any]:
    """What the cell of parameters sets."""
    found: dict[str, Any] = {}
    exec(source, found)
    return {name: value for name, value in found.items() if name != "__builtins__"}


def outputs(cell: Any, kind: str) -> list[str]:
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def test_the_notebook_is_whole_and_without_outputs(book):
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(book))
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in book.cells)


def test_its_defaults_are_the_recipe_for_one_t4(book, monkeypatch):
    cells = code_cells(book)
    given = values(cells[0].source)
    (made,) = [cell.source for cell in cells if "words = [" in cell.source]
    exec(made.split("command = ")[0], given)
    monkeypatch.chdir(ROOT)
    config = parse(given["words"][2:]).config
    recipe = parse(["--recipe", "recipes/one_gpu_16gb.yaml"]).config
    assert config.train.precision == recipe.train.precision == "fp16" and config.model.attention == "sdpa"
    assert (config.model.policy, config.data.train) == (recipe.model.policy, recipe.data.train)
    assert (config.data.train_limit, config.data.validation_limit) == (2000, 500)
    assert config.train.eval_every == "epoch" and config.train.epochs == 3 and config.data.validation is None
    assert "P100" in book.cells[0].source


@pytest.fixture(scope="module")
def run_at_tiny_size(book, tmp_path_factory) -> tuple[list[Any], Path]:
    """The cells after a run with the parameters replaced, and the run directory."""
    folder = tmp_path_factory.mktemp("notebook")
    given = {"suite": str(ROOT), "install": False, "model": "builtin:tiny", "train_limit": 12, "validation_limit": 4}
    for name in ("train", "validation"):
        rows = [json.dumps(row) for row in example.rows(name, limit=12 if name == "train" else 4)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        given[f"{name}_data"] = str(folder / f"{name}.jsonl")
    given |= {"epochs": 2, "precision": "fp32", "run": str(folder / "run"), "prompts": [PROMPT], "answer_tokens": 4}
    given["more_settings"] = ["--train.global_batch_size", "6", "--log.sample_tokens", "4", "--optim.lr", "1e-3"]
    copy = nbformat.from_dict(json.loads(json.dumps(book)))
    parameters = code_cells(copy)[0]
    assert set(given) <= set(values(parameters.source))
    parameters.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DPO_CACHE": folder / "cache", "HF_HUB_OFFLINE": 1, "IPYTHONDIR": folder / "ipython",
                            "JUPYTER_RUNTIME_DIR": folder / "jupyter", "OMP_NUM_THREADS": 1}.items():  # fmt: skip
            patch.setenv(name, str(value))
        nbclient.NotebookClient(copy, timeout=120, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    return code_cells(copy), folder / "run"


def test_it_trains_with_a_validation_before_and_after_each_epoch(run_at_tiny_size):
    cells, run = run_at_tiny_size
    lines = read_lines(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines if "eval_loss" in line] == [0, 1, 2]
    assert (run / "final/model.safetensors").exists()
    (shown,) = [html for cell in cells for html in outputs(cell, "text/html") if "accuracy" in html]
    assert "0.6931" in shown and shown.count("<tr>") == 4


def test_it_shows_curves_and_the_answers_of_both_models(run_at_tiny_size):
    cells, run = run_at_tiny_size
    assert sum(len(outputs(cell, "image/png")) for cell in cells) == 1
    tables = [html for cell in cells for html in outputs(cell, "text/html") if "policy</th>" in html]
    for html, name in zip(tables, ("samples", "answers"), strict=True):
        rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        shown = [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", html, re.DOTALL)]
        assert shown == [row[key] for row in rows for key in ("prompt", "reference", "policy")]
        assert rows
    assert "1 &lt; 2 &amp; 2 &lt; 3?" in tables[1]
