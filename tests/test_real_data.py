"""Real preference data and a real model, through the real launchers."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import train_dpo
from dpo.objective.objective import Objective
from dpo.runtime.tracking import read_lines
from tests import ranks
from tests.by_path import prepare_pairs


@pytest.fixture(scope="module")
def short_rows(shared_data, tmp_path_factory) -> Path:
    """The shortest 64 of the first 400 HH rows, in their order: all fit the small model's context whole."""
    folder = tmp_path_factory.mktemp("rows")
    source = shared_data / "hh-rlhf/train.jsonl.gz"
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "stories260k-llama")
    pairs, _ = prepare_pairs(
        source, tokenizer, limit=400, max_length=512, on_bad_row="skip", cache_dir=folder / "cache"
    )
    whole = pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1) < 512
    lines = gzip.open(source, "rt", encoding="utf-8").read().splitlines()
    shortest = sorted(whole.nonzero()[0], key=lambda i: pairs.lengths[i].sum())[:64]
    chosen = [lines[row - 1] for row in pairs.row_numbers[sorted(shortest)]]
    assert len(chosen) == 64
    (folder / "64.jsonl").write_text("\n".join(chosen), encoding="utf-8")
    return folder / "64.jsonl"


def test_a_real_model_starts_at_ln_2_with_dropout_in_its_config_and_learns_its_rows(shared_data, short_rows, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(shared_data / "stories260k-llama", policy, copy_function=shutil.copyfile)
    policy.chmod(0o755)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    code = train_dpo.main([
        "--config", "ds_configs/zero2.json", "--model.policy", str(policy), "--data.train", str(short_rows),
        "--data.validation", str(short_rows), "--data.cache_dir", str(tmp_path / "cache"),
        "--train.global_batch_size", "8", "--train.epochs", "3", "--train.precision", "fp32",
        "--optim.lr", "1e-4", "--optim.schedule", "constant", "--optim.warmup_steps", "0",
        "--train.output_dir", str(tmp_path / "run"), "--log.samples", "0",
    ])
    assert code == 0
    lines = read_lines(tmp_path / "run")
    start, first, last = lines[0], lines[1], lines[-1]
    assert (start["step"], first["step"], last["step"]) == (0, 1, 24)
    for line, prefix in ((start, "eval_"), (first, "")):
        assert line[prefix + "loss"] == pytest.approx(0.693147, abs=1e-6)
        for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert line[prefix + name] == 0
        assert line[prefix + "rewards/accuracies"] == 0.5
    assert last["eval_loss"] < 0.15
    assert last["eval_rewards/accuracies"] > 0.95
    final = json.loads((tmp_path / "run/final/config.json").read_text())
    assert final["attention_dropout"] == 0.3


@pytest.fixture(scope="module")
def gpt2_folder(shared_data, tmp_path_factory) -> Path:
    """A random GPT-2 of 2 layers x 64 with the real tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer").save_pretrained(folder)
    return folder


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def hh_runs(shared_data, gpt2_folder, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """SFT and DPO on HH rows, two ranks on one node and on two: run directory and output."""
    one_node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                "--master_addr", "127.0.0.1", "--master_port", free_port()]  # fmt: skip
    hh, found = shared_data / "hh-rlhf", {}
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    for name in ("one node", "a torchrun a node"):
        folder = tmp_path_factory.mktemp("hh")
        job = [
            "train_dpo.py", "--config", "ds_configs/zero2.json", "--model.policy", str(gpt2_folder),
            "--data.train", str(hh / "train.jsonl.gz"), "--data.validation", str(hh / "validation.jsonl.gz"),
            "--data.train_limit", "64", "--data.validation_limit", "8", "--data.on_bad_row", "skip",
            "--data.max_length", "128", "--train.sft_epochs", "1", "--train.global_batch_size", "16",
            "--optim.lr", "1e-5", "--optim.sft_lr", "1e-3", "--log.samples", "1", "--log.sample_tokens", "4",
            "--data.cache_dir", str(folder / "cache"), "--train.output_dir", str(folder / "run"),
        ]  # fmt: skip
        if name == "one node":
            done = ranks.run(job, ranks=2)
            assert done.codes == [0, 0], done.output[-5000:]
            found[name] = folder / "run", done.output
            continue
        nodes = [
            subprocess.Popen([*one_node, "--node_rank", rank, *job], env=environment | {"OMP_NUM_THREADS": "1"},
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in ("0", "1")
        ]  # fmt: skip
        said = [node.communicate(timeout=400)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(said)[-5000:]
        found[name] = folder / "run", "\n".join(said)
    return found


@pytest.mark.parametrize("nodes", ["one node", "a torchrun a node"])
def test_hh_with_sft_runs_to_the_end_on_two_ranks(nodes, hh_runs):
    run, said = hh_runs[nodes]
    assert "chosen == rejected: 1" in said
    lines = read_lines(run)
    sft = [line["sft_loss"] for line in lines if "sft_loss" in line]
    assert len(sft) >= 3 and sft[-1] < sft[0]
    assert next(line for line in lines if line.get("step") == 0)["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    for name in ("config.yaml", "training_metrics.png", "samples.jsonl", "reference/model.safetensors",
                 "final/model.safetensors", "final/README.md", "final/tokenizer.json"):
        assert (run / name).stat().st_size > 0, name


def test_two_nodes_of_one_process_have_the_numbers_and_weights_of_one_node_of_two(hh_runs):
    (one, _), (two, _) = hh_runs.values()
    lines, expected = (
        [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(run)] for run in (two, one)
    )
    assert lines == expected
    assert (one / "final/model.safetensors").read_bytes() == (two / "final/model.safetensors").read_bytes()


def test_a_dry_run_prints_the_plan_and_leaves_nothing(short_rows, shared_data, tmp_path, capsys):
    code = train_dpo.main([
        "--config", "ds_configs/zero2.json", "--model.policy", str(shared_data / "stories260k-llama"),
        "--data.train", str(short_rows), "--data.cache_dir", str(tmp_path / "cache"),
        "--train.output_dir", str(tmp_path / "run"), "--dry_run",
    ])
    printed = capsys.readouterr().out
    assert code == 0
    for words in ("optimizer steps", "costliest micro-batch", "memory per GPU: reference", "layout in use"):
        assert words in printed
    assert not (tmp_path / "run").exists()


def test_prepare_only_fills_the_cache_and_names_the_variables_for_compute_nodes(
    short_rows, shared_data, tmp_path, capsys
):
    argv = ["--model.policy", str(shared_data / "stories260k-llama"), "--data.train", str(short_rows),
            "--data.cache_dir", str(tmp_path / "cache"), "--train.output_dir", str(tmp_path / "run"), "--prepare_only"]
    assert train_dpo.main(argv) == 0
    printed = capsys.readouterr().out
    assert "HF_HUB_OFFLINE=1" in printed and str(tmp_path / "cache") in printed
    assert any((tmp_path / "cache").iterdir()) and not (tmp_path / "run").exists()
    assert train_dpo.main(argv) == 0
    assert "read from the cache" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step_and_names_the_rows(
    short_rows, shared_data, tmp_path, capsys, monkeypatch
):
    calls, compute = [], Objective.__call__

    def poisoned(*args):
        output = compute(*args)
        calls.append(1)
        # The fourth call, after two in the check of the start and step 1, is step 2.
        nan = torch.tensor([0.0, float("nan"), 0.0, 0.0]) if len(calls) == 4 else 0.0
        return replace(output, losses=output.losses + nan)

    monkeypatch.setattr(Objective, "__call__", poisoned)
    code = train_dpo.main([
        "--config", "ds_configs/zero2.json", "--model.policy", str(shared_data / "stories260k-llama"),
        "--data.train", str(short_rows), "--data.cache_dir", str(tmp_path / "cache"), "--data.shuffle", "false",
        "--train.global_batch_size", "4", "--train.save_every", "1",
        "--train.output_dir", str(tmp_path / "run"), "--log.samples", "0",
    ])  # fmt: skip
    assert code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"train_dpo.py: step 2: the loss is not finite for rows 6 of {short_rows}")
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [1]
    (dumped,) = map(json.loads, (tmp_path / "run/nonfinite.jsonl").read_text().splitlines())
    assert dumped["step"] == 2 and dumped["rows"].startswith("rows 6 of") and dumped["chosen"]
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-000001"]
