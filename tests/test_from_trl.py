"""The table for those who come from TRL is whole, and its right side exists."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import transformers
import trl
import yaml

from dpo.commandline import parse
from dpo.config import to_dict
from dpo.objective.metrics import NAMES

TEXT = (Path(__file__).resolve().parents[1] / "docs/from_trl.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.M))


def _settings(section: dict[str, object], before: str = "") -> set[str]:
    names = set()
    for key, value in section.items():
        names.add(before + key)
        if isinstance(value, dict):
            names |= _settings(value, f"{before}{key}.")
    return names


def test_every_field_that_trl_adds_is_in_the_table_and_no_other_is_invented():
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    fields = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert fields - inherited - set(ROWS) == set()
    assert set(ROWS) - fields == set()


def test_every_setting_that_the_page_names_exists():
    named = set(re.findall(r"`((?:model|reference|data|loss|optim|train|log)\.[\w.]+)", TEXT))
    assert len(named) > 30
    config = parse(["--model.policy", "builtin:tiny", "--data.train", "builtin:world"]).config
    assert named - _settings(to_dict(config)) == set()


def test_the_recipe_of_the_page_is_one(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TEXT.split("```yaml\n")[1].split("```")[0])
    config = parse(["--recipe", str(recipe)]).config
    assert config.train.global_batch_size == yaml.safe_load(recipe.read_text())["train"]["global_batch_size"] == 64


def test_the_metrics_of_the_page_are_logged():
    named = re.findall(r"`((?:rewards|logps)/\w+)`", TEXT)
    assert len(named) > 4 and set(named) <= set(NAMES)
