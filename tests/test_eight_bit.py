"""8-bit AdamW under ZeRO: its states are bytes, its run is close to AdamW's, and resumes bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dpo.preference
import dpo.train
import dpo.training.export
import train_dpo
from benchmarks.soak import numbers, weights
from dpo.export import Options, export_run
from dpo.runtime.checkpoint import checkpoints
from dpo.runtime.manifest import size_of
from dpo.runtime.tracking import read_lines
from tests.test_stages import arguments

EIGHT = ("--optim.name", "adamw_8bit")
FLAGS = ("--optim.lr", "1e-3", "--optim.weight_decay", "0.1", "--train.max_steps", "4", "--train.epochs", "4")


@pytest.fixture
def engines(monkeypatch) -> list[Any]:
    """Every run's engine, as it is after training."""
    found: list[Any] = []
    write = dpo.train.write_weights
    monkeypatch.setattr(dpo.train, "write_weights", lambda *args: (found.append(args[1].engine), write(*args)))
    return found


def run(folder: Path, policy: object, *more: str, code: int = 0) -> Path:
    assert train_dpo.main(arguments(folder, policy, "--log.samples", "0", *FLAGS, *more)) == code
    return folder / "run"


def moments(engine: Any) -> list[torch.Tensor]:
    """Of the matrices; bitsandbytes keeps those of fewer than 4,096 weights, here all biases and norms, in fp32."""
    both = [s[name] for s in engine.optimizer.optimizer.state.values() for name in ("state1", "state2")]
    return [m for m in both if m.numel() >= 4096]


@pytest.mark.parametrize(("stage", "precision"), [("zero1", "fp32"), ("zero2", "bf16"), ("zero3", "fp32")])
def test_moments_are_bytes_and_the_run_is_close_to_that_of_adamw(stage, precision, tiny_policy, tmp_path, engines):
    flags = ("--config", f"ds_configs/{stage}.json", "--train.precision", precision)
    plain = run(tmp_path / "plain", tiny_policy, *flags)
    eight = run(tmp_path / "eight", tiny_policy, *flags, *EIGHT)
    assert len(moments(engines[1])) == 2 and {m.dtype for m in moments(engines[1])} == {torch.uint8}
    losses = [[line["loss"] for line in read_lines(folder) if "loss" in line] for folder in (plain, eight)]
    assert losses[0] != losses[1]
    fallen = losses[0][0] - losses[0][-1]  # 0.01 to 0.2; how far rounding leads away is a matter of the CPU too
    assert fallen > 0.003 and losses[1] == pytest.approx(losses[0], abs=max(2e-3, 0.03 * fallen))
    assert weights(plain) != weights(eight)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_checkpoint_takes_the_disk_that_is_planned(stage, tmp_path, monkeypatch):
    """Of a model whose matrices have 8-bit moments, nearly all of it; names and pickles beside it."""
    expected: list[int] = []
    save = dpo.training.export.save
    monkeypatch.setattr(
        dpo.training.export, "save", lambda *a, **k: (expected.append(k["expected_bytes"]), save(*a, **k))[1]
    )
    folder = run(tmp_path, "builtin:tiny", "--config", f"ds_configs/{stage}.json", *EIGHT)
    checkpoint = checkpoints(folder)[-1]
    assert expected[0] < size_of(checkpoint) < 1.4 * expected[0]


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_run_that_was_killed_goes_on_with_the_moments_it_had(stage, tiny_policy, tmp_path, engines, monkeypatch):
    flags = ("--config", f"ds_configs/{stage}.json", "--train.save_every", "2", *EIGHT)
    whole = run(tmp_path / "whole", tiny_policy, *flags)
    take_step = dpo.preference.take_step

    def killed(setup: Any, policy: Any, reference: Any, loss: Any, work: Any, *rest: Any) -> bool:
        if work.step == 3:
            raise KeyboardInterrupt
        return take_step(setup, policy, reference, loss, work, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo.preference, "take_step", killed)
        run(tmp_path / "killed", tiny_policy, *flags)
    resumed = run(tmp_path / "killed", tiny_policy, *flags)
    assert numbers(resumed) == numbers(whole) and weights(resumed) == weights(whole)
    exported = export_run(Options(str(resumed), checkpoint=4)) / "model.safetensors"
    final = load_file(resumed / "final/model.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_file(exported).items())


def test_a_step_on_the_cpu_beside_a_gpu_is_refused(tiny_policy, tmp_path, capsys):
    run(tmp_path, tiny_policy, "--config", "ds_configs/zero2_offload.json", *EIGHT, code=2)
    assert "optim.name is adamw_8bit with offload_optimizer, whose steps run on the CPU" in capsys.readouterr().err
