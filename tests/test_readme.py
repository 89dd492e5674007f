"""The README is true: its commands run, at tiny sizes where they train; its paths, settings, rows and figures exist.

Also held here: every recipe parses and says how to run it and what to expect, and docs/settings.md is up to date.
`make` targets are run by CI, sbatch by tests/slurm; here their arguments are checked.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo.__main__ import VERBS
from dpo.commandline import Command, parse
from dpo.config import to_dict
from dpo.data.formats import convert, detect_format

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *RECIPES]
SECTIONS = ("model", "reference", "data", "loss", "optim", "train", "log")

TINY = {
    "--model.policy": "builtin:tiny",
    "--data.train_limit": "12",
    "--data.validation_limit": "4",
    "--data.max_length": "200",
    "--data.max_prompt_length": "150",
    "--train.precision": "fp32",
    "--train.global_batch_size": "6",
    "--train.epochs": "1",
    "--train.max_steps": "2",
    "--log.samples": "2",
    "--log.sample_tokens": "4",
}
"""Laid over a command of the README to make a run of seconds on a CPU."""
BUILT_IN_DATA = {
    "--data.train": "builtin:world",
    "--data.train_split": "train",
    "--data.validation_split": "validation",
}


def _fences(language: str) -> list[str]:
    """The README's fenced blocks of a language; "" for those of none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in blocks if name == language]


def _commands() -> list[list[str]]:
    """The words of every command in the README's bash blocks."""
    lines = [line for block in _fences("bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part and not part.startswith("#")]


def _arguments(words: Sequence[str]) -> list[str] | None:
    """What follows train_dpo.py or slurm/dpo.sh; None where the command does not train."""
    at = next((i for i, word in enumerate(words) if word in ("train_dpo.py", "slurm/dpo.sh")), None)
    return None if at is None else list(words[at + 1 :])


TRAINING = [words for words in _commands() if _arguments(words) is not None]


def _parsed(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A training command as its launcher and train_dpo.py understand it; what they refuse fails the test."""
    monkeypatch.chdir(ROOT)
    assert words[0] in ("deepspeed", "torchrun", "python", "sbatch", "docker")
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(list(words[1:])).training_script == "train_dpo.py"
    return parse(_arguments(words) or [])


def _known_settings() -> set[str]:
    config = parse(["--model.policy", "gpt2", "--data.train", "rows.jsonl"]).config

    def names(values: dict[str, Any], prefix: str) -> set[str]:
        nested = {key: value for key, value in values.items() if value and isinstance(value, dict)}
        own = {prefix + key for key in values if key not in nested}
        return own.union(*(names(value, f"{prefix}{key}.") for key, value in nested.items()))

    return names(to_dict(config), "")


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_readme_shows_every_way_of_launching():
    starts = {tuple(words[:2]) for words in TRAINING} | {(words[0],) for words in TRAINING}
    assert {("deepspeed", "train_dpo.py"), ("torchrun", "--nproc_per_node"), ("sbatch",), ("python",)} <= starts


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_every_command_is_one_that_exists(words, monkeypatch):
    if _arguments(words) is not None:
        command = _parsed(words, monkeypatch)
        assert command.deepspeed_json and json.loads((ROOT / command.deepspeed_json).read_text())
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:3] == ["python", "-m", "dpo"]:
        assert words[3] in VERBS
    else:
        shell = ("python3 -m venv", ". .venv/bin/activate", "pip install -r", "pip install -c", "mkdir -p runs")
        docker = (["docker", "build", "-t", "dpo", "."], ["docker", "run", "--gpus", "all", "-it", "dpo"])
        assert " ".join(words[:3]) in shell or words in docker, f"no test knows the command {words}"


def test_make_quickstart_runs_the_launch_line_without_model_and_data():
    recipe = re.search(r"^quickstart:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    words = shlex.split(recipe.group(1).strip().splitlines()[-1])
    assert parse(_arguments(words) or []).assumed_quickstart


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _own_port(words: Sequence[str]) -> list[str]:
    """The same launcher on a port of its own, and with the Python that runs the tests."""
    binaries = Path(sys.executable).parent
    if words[0] == "deepspeed":
        return [str(binaries / "deepspeed"), "--master_port", str(_free_port()), *words[1:]]
    if words[0] == "torchrun":
        return [str(binaries / "torchrun"), "--master_port", str(_free_port()), *words[1:]]
    return [sys.executable, *words[1:]]


def _run(
    words: Sequence[str], overrides: dict[str, str], folder: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    extra = [word for pair in (TINY | overrides).items() for word in pair]
    more |= {"OMP_NUM_THREADS": "1", "DPO_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*_own_port(words), *extra], cwd=ROOT, env=os.environ | more, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def _the_command(start: str, *parts: str) -> list[str]:
    found = [words for words in TRAINING if " ".join(words).startswith(start) and set(parts) <= set(words)]
    assert found, f"the README shows no command '{start} ... {' '.join(parts)}'"
    return found[0]


def _run_directory_of_the_readme() -> set[str]:
    """Names at the top of a run directory, as the README lists them."""
    block = next(block for block in _fences("") if "config.yaml" in block)
    names = [word for line in block.splitlines() for word in re.split(r"\s{3,}", line)[0].split()]
    return {name.split("/")[0] for name in names}


def _metrics_of_the_docs() -> set[str]:
    """Names in the first column of the table of metrics."""
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8").split("## Metrics")[1]
    return {name for cell in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`(.+?)`", cell)}


def test_the_deepspeed_command_trains_and_leaves_what_the_readme_lists(tmp_path):
    run = tmp_path / "run"
    words = _the_command("deepspeed train_dpo.py", "recipes/gpt2_hh.yaml")
    _run(words, BUILT_IN_DATA | {"--train.output_dir": str(run)}, tmp_path, LOCAL_SIZE="2")
    assert list(run.glob("checkpoints/*/*pp_rank_1_mp_rank_00_optim_states.pt"))

    assert {path.name for path in run.iterdir() if path.name[0] != "."} == _run_directory_of_the_readme()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    start = next(line for line in lines if line.get("step") == 0)
    assert start["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert start["eval_rewards/accuracies"] == 0.5 and start["eval_rewards/margins"] == 0
    written = {name.removeprefix("eval_") for line in lines for name in line} - {"step", "epoch"}
    assert written == _metrics_of_the_docs()

    (block,) = _fences("python")
    assert "runs/gpt2_hh/final" in block
    loaded: dict[str, Any] = {}
    exec(block.replace("runs/gpt2_hh/final", str(run / "final")), loaded)
    assert len(loaded["tokenizer"]) <= loaded["model"].get_input_embeddings().num_embeddings


def test_the_command_for_your_own_data_trains_on_the_row_that_is_shown(tmp_path):
    row = _rows_of_the_readme()["prompt"]
    for name, count in (("my_pairs.jsonl", 12), ("my_validation.jsonl", 3)):
        (tmp_path / name).write_text(f"{json.dumps(row)}\n" * count)
    words = [str(tmp_path / word) if word.startswith("my_") else word for word in _the_command("torchrun", "runs/mine")]
    assert str(tmp_path / "my_pairs.jsonl") in words and str(tmp_path / "my_validation.jsonl") in words
    done = _run(words, {"--train.output_dir": str(tmp_path / "run")}, tmp_path)
    assert "continuing" not in done.stderr and (tmp_path / "run" / "final" / "model.safetensors").exists()


# --- what the text says ----------------------------------------------------------------------------------------------


def _rows_of_the_readme() -> dict[str, dict[str, Any]]:
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", README, re.MULTILINE)
    return {name: json.loads(row) for name, row in rows}


def test_the_rows_shown_are_read_in_the_format_they_stand_for():
    rows = _rows_of_the_readme()
    assert set(rows) == {"hh", "prompt", "conversation"}
    for form, row in rows.items():
        assert detect_format([row]) == form
        preference, problems = convert(row, form, 1)
        assert preference is not None and not problems


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_setting_that_is_named_exists(document):
    text = document.read_text(encoding="utf-8")
    known = _known_settings()
    known |= {name.rpartition(".")[0] for name in known}  # sections, those within sections among them
    flags = set(re.findall(r"--([a-z]+(?:\.[a-z0-9_]+)+)", text))
    quoted = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.[a-z0-9_]+)+)`", text))
    assert flags | quoted <= known, f"unknown settings: {sorted((flags | quoted) - known)}"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(document):
    text = document.read_text(encoding="utf-8")
    folders = "dpo|ds_configs|recipes|slurm|docs|tests|benchmarks|notebooks"
    here = rf"(?<![\w./-])((?:{folders})/[\w./-]*\w|[A-Z]+\.md|LICENSE\b)"
    named = set(re.findall(here, text))
    # Recipes quote files of other projects, which they name; and env.sh is the user's to write.
    elsewhere = {"recipes/zephyr-7b-beta/dpo/config_full.yaml", "slurm/env.sh"}
    missing = sorted(name for name in named - elsewhere if not (ROOT / name).exists())
    assert not missing, f"{document.name} names what is not there: {missing}"


def _tree() -> list[str]:
    """Modules of the README's tree, in its order."""
    block = next(block for block in _fences("") if block.startswith("train_dpo.py"))
    folder, modules = "", []
    for line in block.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = "" if name == "dpo/" else name
        else:
            inside = line.startswith("    ")
            modules.append(name if not line.startswith(" ") else f"dpo/{folder if inside else ''}{name}")
    return modules


def _imported(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dpo":
            base = str(node.module).replace(".", "/")
            for name in (f"{base}/{alias.name}.py" for alias in node.names):
                found.add(name if (ROOT / name).exists() else f"{base}.py")
    return found


def test_the_tree_lists_every_module_once_and_imports_go_up():
    listed = _tree()
    real = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo").rglob("*.py") if path.name != "__init__.py"}
    assert sorted(listed) == sorted(real | {"train_dpo.py"})
    order = [name for name in listed if name != "train_dpo.py"]
    for place, name in enumerate(order):
        below = _imported(ROOT / name) - set(order[:place])
        assert not below, f"{name} imports {sorted(below)}, which the README lists below it"


def test_the_memory_table_is_the_planners_arithmetic():
    from dpo.plan import memory

    rows = re.findall(r"^\| (\d+)([MB]) .*?\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 4
    for size, unit, ranks, *shown in rows:
        count = int(size) * {"M": 10**6, "B": 10**9}[unit]
        for stage, figure in zip((1, 2, 3), shown, strict=True):
            parts = memory(count, stage=stage, world_size=int(ranks), half=True, reference_bytes=2)
            assert sum(parts.values()) == pytest.approx(float(figure), rel=0.02, abs=0.06)


def test_the_settings_page_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "config_table.py"))["render"]()
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page, "run: python -m docs.config_table > docs/settings.md"
    assert _known_settings() == set(re.findall(r"^\| `([a-z]+\.[a-z0-9_.]+)`", page, re.MULTILINE))


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it_and_what_to_expect(recipe, monkeypatch):
    text = recipe.read_text(encoding="utf-8")
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    for word in ("command", "hardware", "expected"):
        assert re.search(rf"\b{word}\b", header, re.IGNORECASE), f"{recipe.name} does not say: {word}"
    commands = re.findall(r"\b(?:deepspeed|torchrun|python) (?:.* )?train_dpo\.py.*", text)
    assert commands, f"{recipe.name} shows no command"
    for command in commands:
        assert Path(str(_parsed(shlex.split(command), monkeypatch).recipe)).resolve() == recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_what_the_run_gets(recipe):
    wanted = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    got = to_dict(parse(["--recipe", str(recipe)]).config)
    for section, values in wanted.items():
        for key, value in values.items():
            nested = value.items() if isinstance(value, dict) else [(key, value)]
            found = got[section][key] if isinstance(value, dict) else got[section]
            for name, given in nested:
                # YAML 1.1 reads 5e-6 as text; the run must not.
                expected = float(given) if isinstance(found[name], float) else given
                assert found[name] == expected, f"{section}.{key}"


def test_the_recipes_are_those_that_the_readme_names():
    named = set(re.findall(r"recipes/(\w+\.yaml)", README))
    assert named == {recipe.name for recipe in RECIPES}
