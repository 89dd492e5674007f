"""A continued run is on the data and the weights that it was begun on, or says what has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import dpo.run.inputs
import train_dpo
from dpo.commandline import parse
from dpo.run.inputs import _weights
from dpo.runtime.tracking import read_lines
from tests import tiny
from tests.test_stages import arguments


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    write(path, "abcdefgh")
    return path


def write(path: Path, prompts: str) -> None:
    made = ({"prompt": f"Say {p}:", "chosen": f" {p}", "rejected": " no"} for p in prompts)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def started(folder: Path, policy: Path, rows: Path, steps: int, *flags: str) -> int:
    data = ["--data.train", str(rows), "--data.validation", str(rows), "--train.global_batch_size", "4"]
    more = [*data, "--train.max_steps", str(steps), "--log.samples", "0", *flags]
    return train_dpo.main(arguments(folder, policy, *more))


def test_a_run_on_the_same_inputs_goes_on_whatever_else_happened_to_the_file(tiny_policy, tmp_path, rows):
    assert started(tmp_path, tiny_policy, rows, 1) == 0
    before = (tmp_path / "run/inputs.json").read_text()
    rows.write_text(rows.read_text().replace(": ", ":  "))  # another file, the same rows
    assert started(tmp_path, tiny_policy, rows, 2) == 0
    assert (tmp_path / "run/inputs.json").read_text() == before and read_lines(tmp_path / "run")[-1]["step"] == 2


def test_a_run_whose_rows_have_changed_is_refused_by_name_until_told_otherwise(tiny_policy, tmp_path, rows, capsys):
    assert started(tmp_path, tiny_policy, rows, 1) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    write(rows, "zbcdefgh")
    assert started(tmp_path, tiny_policy, rows, 2) == 2
    said = capsys.readouterr().err
    assert "was begun on other inputs: training pairs and validation pairs changed since; name another" in said
    assert (tmp_path / "run/metrics.jsonl").read_text() == lines
    (tmp_path / "run/inputs.json").unlink()
    assert started(tmp_path, tiny_policy, rows, 2) == 0


def test_a_run_is_on_the_ratings_that_it_was_begun_on(tiny_policy, tmp_path, rows, capsys):
    def rated(by: int) -> None:
        made = ({"prompt": f"Say {i}:", "completions": [" yes", " no"], "scores": [by + i, 0]} for i in range(8))
        rows.write_text("".join(json.dumps(row) + "\n" for row in made))

    rated(1)
    assert started(tmp_path, tiny_policy, rows, 1, "--loss.name", "odpo") == 0
    rated(2)
    assert started(tmp_path, tiny_policy, rows, 2, "--loss.name", "odpo") == 2
    assert "was begun on other inputs: training pairs and validation pairs changed" in capsys.readouterr().err


def test_a_run_whose_policy_has_changed_is_refused_by_name(tmp_path, shared_data, rows, capsys, tiny_policy):
    policy = tiny.saved(tmp_path / "policy", "llama", tiny_policy, vocab_size=600)
    assert started(tmp_path, policy, rows, 1) == 0
    (weights,) = policy.glob("*.safetensors")
    os.utime(weights, (1, 1))
    assert started(tmp_path, policy, rows, 2) == 0
    content = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in content.items()}, weights, {"format": "pt"})
    assert started(tmp_path, policy, rows, 3, "--train.epochs", "2") == 2
    assert f"was begun on other inputs: model.policy {policy} changed since" in capsys.readouterr().err


def test_a_policy_that_sft_has_replaced_may_change_or_be_gone(tmp_path, rows, tiny_policy, capsys):
    policy = tiny.saved(tmp_path / "policy", "llama", tiny_policy, vocab_size=600)
    assert started(tmp_path, policy, rows, 1, "--train.sft_epochs", "1") == 0
    (weights,) = policy.glob("*.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert started(tmp_path, policy, rows, 2, "--train.sft_epochs", "1") == 0
    assert f"model.policy {policy}" in (tmp_path / "run/inputs.json").read_text()


def test_a_run_that_took_no_step_may_begin_on_other_rows(tiny_policy, tmp_path, rows, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dpo.train.start_models", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            started(tmp_path, tiny_policy, rows, 1)
    write(rows, "ab")
    assert started(tmp_path, tiny_policy, rows, 1, "--train.global_batch_size", "2") == 0


def test_weights_of_the_hub_are_known_by_what_is_in_them(tmp_path, monkeypatch):
    asked = []

    def fetched(path, *, revision, name):
        asked.append((path, revision))
        return None if path.startswith("builtin") else tmp_path

    (tmp_path / "model.safetensors").write_bytes(b"one")
    monkeypatch.setattr(dpo.run.inputs.load, "fetch_weights", fetched)
    settings = parse(["--model.policy", "gpt2", "--model.revision", "main", "--data.train", "d"]).config
    before = _weights(settings, "gpt2", is_policy=True)
    assert list(before) == ["gpt2 model.safetensors"] and asked[-1] == ("gpt2", "main")
    (tmp_path / "README.md").write_text("a new commit")
    assert _weights(settings, "gpt2", is_policy=True) == before
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert _weights(settings, "gpt2", is_policy=True) != before
    assert _weights(settings, "builtin:tiny", is_policy=True) == {}
    assert _weights(settings, None, is_policy=False) is None
