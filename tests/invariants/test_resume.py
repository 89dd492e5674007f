"""A run that was killed and started again is the run that was never killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.soak import numbers, weights
from dpo.runtime.run_directory import reopen
from dpo.runtime.tracking import read_lines
from tests.ranks import run as run_on_ranks


def train(argv: list[str], ranks: int) -> str:
    """Run to the end; what it printed."""
    done = run_on_ranks(["tests/invariants/run_killed.py", "never", *argv], ranks)
    assert not any(done.codes), done.output[-5000:]
    return done.output


def kill(moment: str, argv: list[str], ranks: int) -> None:
    """Run until the moment of death."""
    done = run_on_ranks(["tests/invariants/run_killed.py", moment, *argv], ranks)
    assert done.codes == [-9] * ranks, done.output[-5000:]


@pytest.fixture(scope="module")
def argv(shared_data, tmp_path_factory) -> list[str]:
    """A run with SFT, 2 epochs of 4 steps of DPO, and a checkpoint every second step."""
    return [
        "--config", "ds_configs/zero2.json", "--model.policy", str(shared_data / "stories260k-llama"),
        "--data.train", str(shared_data / "hh-rlhf/train.jsonl.gz"), "--data.train_limit", "32",
        "--data.validation", str(shared_data / "hh-rlhf/validation.jsonl.gz"), "--data.validation_limit", "9",
        "--data.on_bad_row", "skip", "--data.max_length", "128", "--data.cache_dir",
        str(tmp_path_factory.mktemp("cache")), "--train.global_batch_size", "8", "--train.epochs", "2",
        "--train.sft_epochs", "1", "--train.save_every", "2", "--optim.lr", "3e-4", "--optim.sft_lr", "1e-4",
        "--log.samples", "2", "--log.sample_tokens", "8", "--log.every", "3",
    ]


@pytest.fixture(scope="module")
def uninterrupted(argv, tmp_path_factory) -> dict[int, Path]:
    """The run that was never killed, at one and two ranks."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"whole{ranks}") / "run"
        train([*argv, "--train.output_dir", str(folders[ranks])], ranks)
    return folders


@pytest.mark.parametrize(
    ("moment", "ranks"),
    [("in_step:4", 1), ("after_sft", 1), ("in_step:7", 1), ("in_step:10", 2), ("in_save:5", 1), ("in_evaluation:2", 2),
     ("in_final", 2)],
)
def test_a_killed_run_ends_in_the_same_metrics_and_the_same_weights(argv, uninterrupted, tmp_path, moment, ranks):
    run = tmp_path / "run"
    here = [*argv, "--train.output_dir", str(run)]
    kill(moment, here, ranks)
    assert not (run / "final").exists()
    place = json.loads((run / "status.json").read_text())["place"]
    assert place == "writing the checkpoint of SFT step 2" or moment not in ("in_step:4", "after_sft")
    printed = train(here, ranks)
    assert numbers(run) == numbers(uninterrupted[ranks])
    assert weights(run) == weights(uninterrupted[ranks])
    assert (run / "samples.jsonl").read_text() == (uninterrupted[ranks] / "samples.jsonl").read_text()
    in_sft = moment == "in_step:4"
    assert ("continuing SFT from" in printed and "after step 2" in printed) is in_sft
    assert ("continuing from" in printed) is (moment != "after_sft" and not in_sft)
    assert in_sft or "SFT" not in printed  # a finished SFT stage is never repeated


@pytest.mark.parametrize(
    ("moment", "ranks", "step"),
    [
        ("in_step:2:SIGTERM", 1, 0),  # of the SFT stage; as in the line below
        ("in_step:9:SIGUSR1", 2, 6),  # in the update of step 5, after the ranks have looked: the next step is the last
        ("in_evaluation:2:SIGINT", 1, 4),
    ],
)
def test_a_run_that_is_asked_to_stop_loses_no_step_and_says_so(argv, uninterrupted, tmp_path, moment, ranks, step):
    run = tmp_path / "run"
    here = [*argv, "--train.output_dir", str(run), "--train.save_every", "7"]
    done = run_on_ranks(["tests/invariants/run_killed.py", moment, *here], ranks)
    assert done.codes == [75] * ranks, done.output[-3000:]
    assert done.output.count("start again to continue") == 1
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", step)
    assert status["place"] == f"writing the checkpoint of {f'step {step}' if step else 'SFT step 3'}"
    name = moment.split(":")[2]
    assert status["reason"] in (f"{name} received", "a signal reached another rank")
    folders = [entry.name for entry in (run / "checkpoints").iterdir()]
    assert folders == [f"step-{step:06d}" if step else "sft-000003"]
    train(here, ranks)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert numbers(run) == numbers(uninterrupted[ranks])
    assert weights(run) == weights(uninterrupted[ranks])
    assert (run / "samples.jsonl").read_text() == (uninterrupted[ranks] / "samples.jsonl").read_text()


def test_a_finished_run_says_so_and_a_raised_number_of_epochs_continues_it(argv, uninterrupted, tmp_path):
    run = tmp_path / "run"
    here = [*argv, "--train.output_dir", str(run), "--optim.schedule", "constant", "--optim.warmup_steps", "0"]
    train([*here, "--train.epochs", "1"], 1)
    before = (run / "metrics.jsonl").read_bytes()
    assert "is finished" in train([*here, "--train.epochs", "1"], 1)
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "checkpoints/partial-step-000003").mkdir()  # as of a process that was killed
    train([*here, "--train.epochs", "2"], 1)
    assert not list((run / "checkpoints").glob("partial-*"))
    steps = [line["step"] for line in read_lines(run) if "loss" in line]
    assert steps == [3, 4, 6, 8]
    whole = tmp_path / "whole"
    train([*here, "--train.output_dir", str(whole), "--train.epochs", "2"], 1)
    assert weights(run) == weights(whole)
    # A checkpoint that is named is gone back to, though the run is finished.
    newest = max((run / "checkpoints").glob("step-*"))
    said = train([*here, "--train.epochs", "2", "--train.resume", str(newest)], 1)
    assert f"continuing from {newest}" in said and "is finished" not in said
    finished, earlier = json.loads((run / "finished.json").read_text())["step"], [int(newest.name[-6:]), 3]
    assert finished == earlier[0] == 8
    reopen(run, 8)
    assert (run / "finished.json").is_file()
    reopen(run, 7)  # it is not finished before it has done those steps again
    assert not (run / "finished.json").exists()
    assert weights(run) == weights(whole)


def test_the_reference_after_sft_is_the_sft_model_not_the_start(uninterrupted, shared_data):
    start = (shared_data / "stories260k-llama" / "model.safetensors").read_bytes()
    run = uninterrupted[1]
    assert (run / "reference" / "model.safetensors").read_bytes() != start
    lines = read_lines(run)
    sft = [line for line in lines if "sft_loss" in line]
    assert [line["sft_step"] for line in sft] == [3, 4]
    assert not any("loss" in line or "step" in line for line in sft)
    first = next(line for line in lines if line.get("step") == 0)
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-6) and first["eval_rewards/margins"] == 0
