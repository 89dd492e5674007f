"""train.save_weights_only: checkpoints of the weights alone, and the run that goes on from one."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

import train_dpo
from dpo.__main__ import main as verbs
from dpo.estimate import checkpoint_bytes
from dpo.runtime.tracking import read_lines
from tests.data.tiny_tokenizers import plain_rows, written


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_run_goes_on_from_weights_alone_with_new_moments_and_says_so(
    stage, precision, tiny_policy, tmp_path, monkeypatch, capsys
):
    written(tmp_path, plain_rows(12))
    config, run = tmp_path / "ds.json", tmp_path / "run"
    zero = {1: '"stage": 1', 2: '"stage": 2', 3: '"stage": 3, "stage3_param_persistence_threshold": 0'}[stage]
    config.write_text(f'{{"zero_optimization": {{{zero}}}}}')
    argv = [
        "--config", str(config), "--model.policy", str(tiny_policy), "--data.train", str(tmp_path / "train.jsonl"),
        "--data.cache_dir", str(tmp_path / "cache"), "--train.global_batch_size", "4", "--train.max_steps", "3",
        "--optim.lr", "3e-3", "--optim.warmup_steps", "0", "--log.samples", "0", "--train.precision", precision,
        "--train.save_every", "1", "--train.keep_checkpoints", "9", "--train.save_weights_only", "true",
        "--train.epochs", "2",
    ]  # fmt: skip
    assert train_dpo.main([*argv, "--train.output_dir", str(run)]) == 0
    whole = {line["step"]: line for line in read_lines(run) if "loss" in line}
    folder = run / "checkpoints/step-000001"
    assert not list(folder.rglob("*.pt"))
    assert {p.name for p in folder.iterdir()} == {"weights", "state.json", "manifest.json"}
    shutil.rmtree(run / "final")
    (run / "finished.json").unlink()
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    capsys.readouterr()
    assert train_dpo.main([*argv, "--train.output_dir", str(run)]) == 0
    assert f"checkpoint {folder} holds the weights alone: AdamW's moments start anew" in capsys.readouterr().err
    resumed = {line["step"]: line for line in read_lines(run) if "loss" in line}
    near = 1e-6 if precision == "fp32" else 0.02  # weights were rounded to 16 bits
    for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "learning_rate"):
        assert resumed[2][key] == pytest.approx(whole[2][key], rel=near, abs=1e-6), key
    assert resumed[3]["loss"] != pytest.approx(whole[3]["loss"], rel=1e-5), "the moments were not new"
    assert resumed[3]["rewards/margins"] > resumed[2]["rewards/margins"], "the step was taken from the old weights"
    assert resumed[3]["learning_rate"] == whole[3]["learning_rate"]
    out = tmp_path / "export"
    assert not verbs(["export", str(run), "--checkpoint", "1", "--to", str(out)])
    saved, exported = load_file(folder / "weights/model.safetensors"), load_file(out / "model.safetensors")
    assert saved.keys() == exported.keys()
    count = sum(tensor.numel() for tensor in saved.values())
    planned = checkpoint_bytes(count, stage=stage, half=precision == "bf16", weights_only=True)
    assert planned <= (folder / "weights/model.safetensors").stat().st_size <= planned + 8192
    assert all(saved[name].equal(exported[name].to(saved[name].dtype)) for name in saved)
