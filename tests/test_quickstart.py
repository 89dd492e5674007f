"""The quickstart learns its world in the time it promises."""

from __future__ import annotations

import json
import time

import pytest

import train_dpo
from dpo.runtime.tracking import read_lines
from dpo.sampling.answers import world_rewards


def test_the_quickstart_prefers_and_writes_better_answers_to_held_out_prompts(tmp_path, capsys):
    started = time.perf_counter()
    code = train_dpo.main([
        "--config", "ds_configs/zero2.json", "--recipe", "recipes/quickstart.yaml",
        "--train.output_dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "cache"),
    ])
    seconds = time.perf_counter() - started
    assert code == 0
    lines = read_lines(tmp_path / "run")
    evaluations = [line for line in lines if "eval_loss" in line]
    assert evaluations[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert evaluations[-1]["eval_rewards/accuracies"] >= 0.9
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    found = world_rewards(rows)
    assert len(rows) >= 64
    assert found["policy"] > found["reference"] and found["p"] < 0.01
    assert found["parsed"] >= 0.95
    printed = capsys.readouterr().err
    assert f"{evaluations[-1]['eval_rewards/accuracies']:.4f}" in printed
    assert f"{found['reference']:.4f}" in printed and f"{found['policy']:.4f}" in printed
    assert printed.count("policy:   ") == printed.count("reference: ") - 1 == 2  # one more line names its dtype
    assert seconds < 180
