"""A step whose loss or gradient is not finite: no rank takes it, and with train.on_nonfinite skip the run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

import dpo.preference
import dpo.sft
import dpo.training.nonfinite
import dpo.training.step
import train_dpo
from benchmarks.soak import numbers, weights
from dpo.errors import UserError
from dpo.run.setup import Setup
from dpo.runtime import engine
from dpo.runtime.tracking import read_lines
from dpo.training.nonfinite import Nonfinite
from tests import ranks

SKIP = ("--train.on_nonfinite", "skip")
BAD = 5
"""A pair of the second of four steps."""


@pytest.fixture
def argv(tiny_policy, tmp_path) -> list[str]:
    """Four steps of four pairs in the order of the file."""
    return [
        "--config", "ds_configs/zero2.json", "--model.policy", str(tiny_policy), "--data.train", "builtin:world",
        "--data.train_limit", "16", "--data.validation_limit", "4", "--data.shuffle", "false",
        "--data.cache_dir", str(tmp_path / "cache"), "--train.global_batch_size", "4", "--train.micro_batch_size", "2",
        "--optim.lr", "1e-3", "--optim.sft_lr", "1e-3", "--log.samples", "0",
    ]  # fmt: skip


def poison(monkeypatch: pytest.MonkeyPatch, what: str, *pairs: int) -> None:
    """Spoil the losses of some pairs, or the gradient of their micro-batches alone."""
    losses_of = dpo.training.step.losses_of

    def spoilt(policy: Any, batch: Any, *rest: Any) -> Any:
        total, output, logps = losses_of(policy, batch, *rest)
        here = torch.tensor([pair_id in pairs for pair_id in batch.pair_ids])
        if not here.any():
            return total, output, logps
        if what == "loss":  # in what is looked at alone: the gradient itself is finite
            return total, replace(output, losses=output.losses.masked_fill(here, math.inf)), logps
        # The square root of 0 times anything adds nothing to the loss, and 0 times infinity to its gradient.
        return total + (total * 0).sqrt(), output, logps

    monkeypatch.setattr(dpo.training.step, "losses_of", spoilt)


def without_step(monkeypatch: pytest.MonkeyPatch, left_out: int) -> None:
    """Train without ever coming to a step, counted from 0."""
    take_step = dpo.preference.take_step

    def other(setup: Any, policy: Any, reference: Any, loss: Any, work: Any, lr: Any, meter: Any, *rest: Any) -> bool:
        if work.step != left_out:
            return take_step(setup, policy, reference, loss, work, lr, meter, *rest)
        meter.grad_norm, meter.seconds, meter.totals[8] = None, 1.0, 1
        return False

    monkeypatch.setattr(dpo.preference, "take_step", other)


def run(folder: Path, argv: list[str], *more: str, code: int = 0) -> Path:
    assert train_dpo.main([*argv, "--train.output_dir", str(folder), *more]) == code
    return folder


def training(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl but for speed and the count of steps that were left out."""
    return [{k: v for k, v in line.items() if k != "skipped_steps"} for line in numbers(folder)]


@pytest.mark.parametrize(
    ("stage", "precision", "what", "loss"),
    [(0, "fp32", "gradient", "sigmoid"), (1, "bf16", "gradient", "beta_dpo"), (3, "fp32", "loss", "sigmoid")],
)
def test_a_run_that_skips_a_step_is_the_run_that_never_had_it(
    stage, precision, what, loss, argv, tmp_path, monkeypatch, capsys
):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    argv += ["--config", str(tmp_path / "ds.json"), "--train.precision", precision, "--loss.name", loss]
    with monkeypatch.context() as patch:
        without_step(patch, 1)
        never = run(tmp_path / "never", argv)
    poison(monkeypatch, what, BAD)
    skipped = run(tmp_path / "skipped", argv, *SKIP)
    assert weights(skipped) == weights(never)
    assert training(skipped) == training(never)
    lines = [line for line in read_lines(skipped) if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, True, False, False]
    said = f"step 2: the {what} is not finite "
    assert said in (printed := capsys.readouterr().err) and "the step is left out, 1 of at most 10" in printed
    dumped = [json.loads(line) for line in (skipped / "nonfinite.jsonl").read_text().splitlines()]
    assert len(dumped) == (1 if what == "loss" else 4)
    assert {line["step"] for line in dumped} == {2} and all(line["chosen"] for line in dumped)


@pytest.mark.draws  # a line without a loss can be drawn
def test_a_resumed_run_remembers_the_steps_that_were_left_out_and_the_bound_holds_over_both(
    argv, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, "loss", BAD, 13)
    argv += [*SKIP, "--train.save_every", "1", "--log.every", "3"]
    whole = run(tmp_path / "whole", argv)
    lines = [line for line in read_lines(whole) if "loss" in line]
    assert [(line["skipped_steps"], line["loss"] is None) for line in lines] == [(1, False), (2, True)]

    def killed(setup: Setup, policy: Any, reference: Any, loss: Any, work: Any, *rest: Any) -> bool:
        if work.step == 2:
            raise KeyboardInterrupt
        return take_step(setup, policy, reference, loss, work, *rest)

    take_step = dpo.preference.take_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo.preference, "take_step", killed)
        run(tmp_path / "resumed", argv)
    assert json.loads((tmp_path / "resumed/checkpoints/step-000002/state.json").read_text())["skipped"] == 1
    capsys.readouterr()
    resumed = run(tmp_path / "resumed", argv, "--train.max_nonfinite", "1", code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train_dpo.py: step 4: the loss is not finite for rows 14 of builtin:world; 1 steps have")
    assert "left out before it, and train.max_nonfinite allows 1; " in line and "lower optim.lr" in line
    run(resumed, argv)
    assert numbers(resumed) == numbers(whole) and weights(resumed) == weights(whole)
    assert (resumed / "nonfinite.jsonl").read_text() == (whole / "nonfinite.jsonl").read_text()


def test_a_limit_that_is_lowered_below_what_was_left_out_is_one():
    config = SimpleNamespace(train=SimpleNamespace(on_nonfinite="skip", max_nonfinite=3))
    stage = Nonfinite(SimpleNamespace(config=config, run="x"), "sft_step", pytest.fail, count=5)
    with pytest.raises(UserError, match=r"5 steps have been left out before it, .* allows 3; .* lower optim.sft_lr"):
        stage._end_or_go_on("SFT step 9: bad")


def test_an_end_of_the_loss_scale_is_not_told_of_a_gradient_that_was_spoilt_on_purpose(monkeypatch):
    said: list[str] = []
    stage = Nonfinite(SimpleNamespace(), "step", said.append)
    monkeypatch.setattr(Nonfinite, "_leave_out", lambda self, work, losses: said.append("left out"))
    monkeypatch.setattr(dpo.training.nonfinite.deepspeed_engine, "gradient_norm", lambda engine: torch.tensor(math.nan))
    monkeypatch.setattr(dpo.training.nonfinite.deepspeed_engine, "step", lambda *_: (None, "exhausted"))
    work = SimpleNamespace(step=4)
    assert stage.step(None, 1.0, work, [torch.tensor([math.nan])]) == (None, False, False)
    assert said == ["left out"]
    with pytest.raises(UserError, match="step 5: the gradient overflows in fp16 and the loss scale is at its minimum"):
        stage.step(None, 1.0, work, [torch.tensor([1.0])])


def test_in_sft_too_the_step_is_left_out_or_ends_the_run(argv, tmp_path, monkeypatch, capsys):
    argv += ["--train.sft_epochs", "1", "--train.max_steps", "1", "--log.every", "2"]
    step = dpo.sft._step

    def never(policy: Any, work: Any, *rest: Any) -> Any:
        return (None, False) if work.step == 1 else step(policy, work, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.sft, "_step", never)
        without = run(tmp_path / "without", argv)

    def spoilt(policy: Any, work: Any, *rest: Any) -> Any:
        score = policy.score

        def bad(batch: Any) -> Any:
            logps = score(batch)
            here = torch.tensor([pair_id == BAD for pair_id in batch.pair_ids])
            return logps.masked_fill(here, -math.inf)

        policy.score = bad
        try:
            return step(policy, work, *rest)
        finally:
            del policy.score

    monkeypatch.setattr(dpo.sft, "_step", spoilt)
    skipped = run(tmp_path / "skipped", argv, *SKIP)
    assert training(skipped) == training(without) and weights(skipped) == weights(without)
    lines = [line for line in read_lines(skipped) if "sft_loss" in line]
    assert [(line["sft_loss"] is None, line["skipped_steps"]) for line in lines] == [(False, 1), (False, 1)]
    stopped = run(tmp_path / "stopped", argv, code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train_dpo.py: SFT step 2: the loss is not finite for rows 6 of builtin:world; no step was")
    for folder in (skipped, stopped):
        (dumped,) = map(json.loads, (folder / "nonfinite.jsonl").read_text().splitlines())
        assert dumped["sft_step"] == 2 and dumped["rows"].startswith("rows 6 of") and dumped["chosen"]


@pytest.mark.parametrize(
    ("precision", "section"), [("fp32", {"compute_grad_norm": False}), ("bf16", {"check_grad_overflow": False})]
)
def test_skip_is_refused_where_deepspeed_is_told_not_to_look_at_the_gradient(
    precision, section, argv, tmp_path, capsys
):
    content = {"zero_optimization": {"stage": 2}}
    content.setdefault("bf16" if precision == "bf16" else "zero_optimization", {}).update(section)
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = ["--config", str(tmp_path / "ds.json"), "--train.precision", precision, "--optim.max_grad_norm", "0"]
    run(tmp_path / "run", argv, *flags, *SKIP, code=2)
    assert "train.on_nonfinite is skip and --config tells DeepSpeed not to look" in capsys.readouterr().err


class Fp16Engine:
    """What DeepSpeed's fp16 engine does at an overflow, its own loss scaler included; it cannot run on a CPU."""

    def __init__(self, scaler: Any, fp16: dict[str, Any]) -> None:
        from deepspeed.runtime.config import DeepSpeedConfig

        content = {"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": True} | fp16}
        self.config, self.optimizer = DeepSpeedConfig(content).float16_config, self
        self.scaler, self.overflow, self.param_groups = scaler, True, [{}]

    @property
    def loss_scale(self) -> float:
        return self.scaler.loss_scale

    def fp16_enabled(self) -> bool:
        return True

    def dynamic_loss_scale(self) -> bool:
        return self.config.loss_scale == 0

    def dynamic_loss_scale_args(self) -> Any:
        return self.config.dynamic_loss_scale_args()

    def step(self) -> None:
        self.scaler.update_scale(self.overflow)

    def was_step_applied(self) -> bool:
        return False


def test_an_fp16_overflow_lowers_the_scale_and_only_the_lowest_scale_is_the_end(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)
    fp16 = {"initial_scale_power": 2, "min_loss_scale": 1, "hysteresis": 1}
    args = Fp16Engine(None, fp16).dynamic_loss_scale_args()
    scaler = DynamicLossScaler(dtype=torch.half, **args)
    found = [engine.step(Fp16Engine(scaler, fp16), 0.1) for _ in range(3)]
    assert found == [(None, "overflow"), (None, "overflow"), (None, "exhausted")]
    assert scaler.loss_scale == 1
    scaler = DynamicLossScaler(dtype=torch.half, raise_error_at_min_scale=False, **args | {"init_scale": 1})
    assert engine.step(Fp16Engine(scaler, fp16), 0.1) == (None, "exhausted")
    # A scale that the user fixed cannot fall: such a step counts.
    assert engine.step(Fp16Engine(LossScaler(128), {"loss_scale": 128}), 0.1) == (None, "nonfinite")


@pytest.mark.parametrize("outcome", ["overflow", "exhausted"])
def test_an_fp16_overflow_is_logged_and_the_lowest_scale_stops_the_run(
    outcome, argv, tmp_path, monkeypatch, capsys
):
    steps, taken = [], engine.step

    def overflowing(started: Any, lr: float, norm: float) -> Any:
        steps.append(lr)
        return (None, outcome) if len(steps) == 2 else taken(started, lr, norm)

    monkeypatch.setattr(dpo.training.nonfinite.deepspeed_engine, "step", overflowing)
    folder = run(tmp_path / "run", argv, code=0 if outcome == "overflow" else 2)
    printed = capsys.readouterr().err
    assert "step 2: the gradient overflows in fp16" in printed
    assert ("the loss scale is at its minimum; no step was" in printed) is (outcome == "exhausted")
    assert not (folder / "nonfinite.jsonl").exists()
    norms = [line["grad_norm"] is None for line in read_lines(folder) if "loss" in line]
    assert norms == ([False, True, False, False] if outcome == "overflow" else [False])


@pytest.mark.parametrize("ranks_", [1, 2])
def test_weights_that_a_step_has_destroyed_are_no_result(ranks_, argv, tmp_path):
    """The last step's own loss is fine; the evaluation after it shows what it has done."""
    folder = tmp_path / "run"
    more = ["--optim.lr", "1e18", "--optim.warmup_steps", "0", "--train.max_steps", "1"]
    done = ranks.run(["train_dpo.py", *argv, *more, "--train.output_dir", str(folder)], ranks=ranks_)
    assert set(done.codes) == {2}, done.output[-3000:]
    assert done.output.count("the validation loss after step 1 is nan: the weights have left what") == 1
    assert not (folder / "final").exists() and not list((folder / "checkpoints").glob("step-*"))
    assert "begin anew with a lower optim.lr" in done.output
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


POISONED = """
import os, sys
from types import SimpleNamespace
from tests.training.test_nonfinite import poison
if os.environ["RANK"] == "1":
    poison(SimpleNamespace(setattr=setattr), sys.argv[1], 4, 5, 6, 7)  # whichever of the second step's pairs it has
import train_dpo
sys.exit(train_dpo.main(sys.argv[2:]))
"""


@pytest.fixture
def poisoned(tmp_path) -> str:
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED)
    return str(script)


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_what_one_rank_meets_stops_all_before_any_steps_and_is_said_once(config, argv, poisoned, tmp_path):
    more = ["--config", f"ds_configs/{config}.json", "--train.save_every", "1", "--train.output_dir"]
    done = ranks.run([poisoned, "loss", *argv, *more, str(tmp_path / "run")], ranks=2)
    assert done.codes == [2, 2] and done.output.count("step 2: the loss is not finite for rows ") == 1, done.output
    assert [folder.name for folder in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-000001"]
    dumped = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert 0 < len(dumped) < 4 and all(line["step"] == 2 for line in dumped)


@pytest.mark.parametrize(("config", "what"), [("zero2", "gradient"), ("zero3", "loss")])
def test_a_step_that_one_rank_leaves_out_all_leave_out(config, what, argv, poisoned, tmp_path, monkeypatch):
    more = [*SKIP, "--config", f"ds_configs/{config}.json", "--train.output_dir"]
    done = ranks.run([poisoned, what, *argv, *more, str(tmp_path / "two")], ranks=2)
    assert done.codes == [0, 0], done.output
    poison(monkeypatch, what, 4, 5, 6, 7)
    run(tmp_path / "one", argv, *SKIP)
    two, one = ([line for line in read_lines(tmp_path / name) if "loss" in line] for name in ("two", "one"))
    assert [line["skipped_steps"] for line in two] == [0, 1, 1, 1]
    for a, b in zip(two, one, strict=True):
        assert (a["loss"] is None) is (b["loss"] is None) is (a["step"] == 2)
        assert a["step"] == 2 or a["loss"] == pytest.approx(b["loss"], abs=1e-5)
