"""SFT, samples and settings at the edges of a run."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dpo.preference
import dpo.run.prepare
import dpo.sample
import dpo.sft
import dpo.train
import dpo.training.finish
import dpo.training.frozen
import dpo.training.load_models
import train_dpo
from benchmarks.soak import numbers, weights
from dpo.commandline import parse
from dpo.data.planner import Costs
from dpo.errors import UserError
from dpo.model import products
from dpo.model.shape import steady_length
from dpo.report.pairs import COLUMNS, read_pairs
from dpo.run.prepare import resolve_precision
from dpo.run.roles import reference_dtype
from dpo.runtime import checkpoint, heartbeat
from dpo.runtime.tracking import read_lines
from dpo.sampling.answers import _last_tokens
from tests import ranks


def arguments(folder: Path, policy: object, *more: str) -> list[str]:
    """A short run on the built-in data."""
    return [
        "--config", "ds_configs/zero2.json", "--model.policy", str(policy), "--data.train", "builtin:world",
        "--data.train_limit", "16", "--data.validation_limit", "4", "--data.cache_dir", str(folder / "cache"),
        "--train.global_batch_size", "8", "--train.max_steps", "2", "--train.output_dir", str(folder / "run"),
        "--log.samples", "2", "--log.sample_tokens", "2", *more,
    ]  # fmt: skip


def test_a_reference_that_overflows_in_fp16_takes_the_policys_dtype(tiny_policy, tmp_path, monkeypatch, capsys):
    """fp16 is what auto takes on a GPU; an embedding of 1e5 is infinite in it."""
    policy, half = shutil.copytree(tiny_policy, tmp_path / "policy"), torch.float16
    monkeypatch.setattr(dpo.training.frozen, "reference_dtype", lambda *_, **__: (half, "half the memory"))
    assert train_dpo.main(arguments(tmp_path / "plain", policy)) == 0
    assert "reference: online, float16 (half the memory)" in capsys.readouterr().err
    weights = load_file(policy / "model.safetensors")
    name = next(key for key in weights if "embed_tokens" in key)
    save_file(weights | {name: weights[name] * 1e7}, policy / "model.safetensors", {"format": "pt"})
    assert train_dpo.main(arguments(tmp_path / "large", policy)) == 0
    said = capsys.readouterr().err
    assert "reference: online, float32 (the policy's dtype: this model overflows in fp16)" in said
    assert "start: loss 0.693147" in said


def test_weights_are_read_at_the_revisions_that_are_pinned_for_them(monkeypatch):
    argv = ["--model.policy", "a/b", "--model.revision", "one", "--reference.path", "c/d", "--data.train", "rows"]
    config, fetched = parse([*argv, "--reference.revision", "two"]).config, []
    monkeypatch.setattr(dpo.train.adapters, "base_of", lambda path, revision: (path, revision))
    monkeypatch.setattr(dpo.train, "fetch_weights", lambda path, *, revision, name: fetched.append((path, revision)))
    dpo.train._fetch(SimpleNamespace(config=config))
    assert fetched == [("a/b", "one"), ("c/d", "two")]
    loaded: list[object] = []

    def loads(path, **how):
        loaded.append((path, how["revision"]))
        return torch.nn.Linear(1, 1)

    for module, name in ((dpo.training.load_models.load, "load_model"), (dpo.sample, "load_model")):
        monkeypatch.setattr(module, name, loads)
    monkeypatch.setattr(dpo.training.load_models.load, "fetch_weights", lambda path, *, revision, name: None)
    monkeypatch.setattr(dpo.sample, "Scorer", lambda model: SimpleNamespace(model=model))
    world = SimpleNamespace(device=torch.device("cpu"))
    setup = SimpleNamespace(config=config, world=world, dtype=torch.float32)
    dpo.training.load_models.load_weights(setup, "a/b", torch.float32, {}, policy=True)
    dpo.training.load_models.load_weights(setup, "c/d", torch.float32, {})
    dpo.sample._scorer("c/d", setup)
    assert loaded == [("a/b", "one"), ("c/d", "two"), ("c/d", "two")]
    assert config.revision_of("runs/x/reference", is_policy=True) is None
    same = parse([*argv, "--reference.path", "a/b", "--reference.revision", "two"]).config
    assert [same.revision_of("a/b", is_policy=of) for of in (True, False)] == ["one", "two"]


def test_a_checkpoint_of_sft_is_not_begun_where_the_disk_lacks_room_for_it(tiny_policy, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "--train.sft_epochs", "2", "--train.save_every", "1")) == 2
    assert "a checkpoint takes 0.00" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/sft*"))


def test_the_first_step_of_dpo_after_sft_may_take_any_time_as_that_of_a_start_may(builtin, tmp_path, monkeypatch):
    in_step, at = {}, heartbeat.at

    def seen(doing, **more):
        at(doing, **more)
        in_step[doing] = heartbeat._note.in_step

    monkeypatch.setattr(heartbeat, "at", seen)
    flags = ["--train.sft_epochs", "1", "--log.samples", "0", "--train.micro_batch_size", "9"]
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 0
    places = ("in SFT step 1, micro-batch 1", "in SFT step 2, micro-batch 1", "in step 1, micro-batch 1",
              "in step 2, micro-batch 1")  # fmt: skip
    assert [in_step[place] for place in places] == [False, True, False, True]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_sft_is_evaluated_as_dpo_finds_its_result_and_a_resume_repeats_no_evaluation(layout, builtin, tmp_path):
    flags = ["--train.sft_epochs", "2", "--train.eval_every", "3", "--train.save_every", "3", "--log.samples", "0"]
    flags += ["--train.layout", layout, "--data.validation_limit", "7"]
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 0
    lines = read_lines(tmp_path / "run")
    found = {line["sft_step"]: line["eval_sft_loss"] for line in lines if "eval_sft_loss" in line}
    assert list(found) == [0, 3, 4] and found[0] > found[3] > found[4]
    first, _ = read_pairs(tmp_path / "run")
    of = dict(zip(COLUMNS, first.values.T, strict=True))
    mean = -of["reference_chosen_logps"].sum() / of["chosen_length"].sum()
    assert first.step == 0 and len(first.values) == 7 and found[4] == pytest.approx(mean, rel=1e-6)


def test_an_evaluation_of_sft_that_a_stop_kept_from_being_made_is_made_by_the_next_start(
    builtin, tmp_path, monkeypatch
):
    flags = ["--train.sft_epochs", "2", "--train.eval_every", "2", "--train.save_every", "9", "--log.samples", "0"]
    step = dpo.sft._step

    def stopped(policy, work, *rest):
        return step(policy, work, *rest)[0], work.step == 1

    with monkeypatch.context() as patch:
        patch.setattr(dpo.sft, "_step", stopped)
        assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 75
    for _ in range(2):
        assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 0
        steps = [line["sft_step"] for line in read_lines(tmp_path / "run") if "eval_sft_loss" in line]
        assert steps == [0, 2, 4]


def test_a_signal_in_an_evaluation_of_sft_stops_the_run_there_and_loses_no_step(builtin, tmp_path, monkeypatch):
    flags = ["--train.sft_epochs", "2", "--train.eval_every", "2", "--train.save_every", "9", "--log.samples", "0"]
    loss_of, calls = dpo.sft._loss_of, []

    def asked(*args):
        calls.append(args)
        if len(calls) == 2:  # after step 2
            signal.raise_signal(signal.SIGTERM)
        return loss_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.sft, "_loss_of", asked)
        assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 75
    assert (tmp_path / "run/checkpoints/sft-000002").is_dir() and len(calls) == 2
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 0
    lines = read_lines(tmp_path / "run")
    assert [line["sft_step"] for line in lines if "eval_sft_loss" in line] == [0, 2, 4]


def test_an_sft_stage_whose_validation_loss_is_not_finite_ends_the_run(builtin, tmp_path, monkeypatch, capsys):
    flags = ["--train.sft_epochs", "2", "--train.eval_every", "2", "--log.samples", "0"]
    loss_of = dpo.sft._loss_of
    losses = iter([1.0, math.nan])
    monkeypatch.setattr(dpo.sft, "_loss_of", lambda *args: loss_of(*args) and next(losses))
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 2
    said = capsys.readouterr().err
    assert "the validation loss after SFT step 2 is nan" in said and "a lower optim.sft_lr" in said
    assert not (tmp_path / "run/reference").exists()


def test_the_speed_of_sft_after_a_resume_counts_the_steps_since(builtin, tmp_path, monkeypatch, capsys):
    flags = ["--train.sft_epochs", "3", "--train.save_every", "3", "--log.every", "5", "--log.samples", "0"]
    flags += ["--train.eval_every", "4"]
    step = dpo.sft._step

    def killed(policy, work, *rest):
        if work.step == 3:
            raise KeyboardInterrupt
        return step(policy, work, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo.sft, "_step", killed)
        train_dpo.main(arguments(tmp_path, builtin, *flags))
    now, loss_of = [0], dpo.sft._loss_of

    def lasts(seconds, inner):
        return lambda *args: (now.__setitem__(0, now[0] + seconds), inner(*args))[1]

    monkeypatch.setattr(dpo.sft, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(dpo.sft, "_step", lasts(2, step))
    monkeypatch.setattr(dpo.sft, "_loss_of", lasts(100, loss_of))  # which is not of training
    capsys.readouterr()
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 0
    said = capsys.readouterr().err
    assert "continuing SFT" in said and re.search(r"SFT 5/6 loss [\d.]+  0\.5 steps/s", said)


def test_ranks_that_would_plan_other_micro_batches_are_stopped(tiny_policy, tmp_path, monkeypatch, capsys):
    """On the other one the model could not be counted, so that a pair costs something else there."""

    def gathered(mine):
        return [mine, tuple(Costs(1, 1) if isinstance(value, Costs) else value for value in mine)]

    monkeypatch.setattr(dpo.run.prepare, "gather", gathered)
    assert train_dpo.main(arguments(tmp_path, tiny_policy)) == 2
    assert "the ranks do not see the same data, model or kind of device" in capsys.readouterr().err


@pytest.fixture
def sharded(tmp_path) -> str:
    """A ZeRO-3 JSON under which tiny weights are sharded too."""
    always = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3} | dict.fromkeys(always, 0)}))
    return str(tmp_path / "zero3.json")


def test_prompts_that_fill_the_context_are_answered_from_their_end(tiny_policy, tmp_path):
    policy = tmp_path / "gpt2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_policy)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    assert train_dpo.main(arguments(tmp_path, policy, "--data.on_bad_row", "skip", "--log.sample_tokens", "64")) == 0
    rows = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == 2 and all(json.loads(row)["policy"] for row in rows)


@pytest.mark.parametrize(
    ("prompt", "expected"), [([7, 1, 2], [7, 1, 2]), ([7, 1, 2, 3, 4], [7, 3, 4]), ([5, 1, 2, 3, 4], [2, 3, 4])]
)
def test_a_long_prompt_keeps_its_end_and_its_bos(prompt, expected):
    assert list(_last_tokens(prompt, 3, bos=7)) == expected


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_nothing_of_the_sft_engine_is_left_when_dpo_starts(builtin, stage, sharded, tmp_path, monkeypatch):
    held: list[weakref.ref] = []
    left: list[int] = []
    trained, started = dpo.sft._train, dpo.train.start_models

    def remember(setup, policy, *rest):
        trained(setup, policy, *rest)
        held.extend(weakref.ref(p) for p in (policy.engine, policy.scorer, *policy.scorer.parameters()))

    def count(*args):
        gc.collect()
        alive = [ref() for ref in held if ref() is not None]
        left.append(sum(p.numel() + getattr(p, "ds_tensor", p[:0]).numel() for p in alive if torch.is_tensor(p)))
        return started(*args)

    monkeypatch.setattr(dpo.sft, "_train", remember)
    monkeypatch.setattr(dpo.train, "start_models", count)
    config = sharded if stage == "zero3" else "ds_configs/zero2.json"
    assert train_dpo.main(arguments(tmp_path, builtin, "--train.sft_epochs", "1", "--config", config)) == 0
    assert held and left == [0]


@pytest.fixture
def builtin(tiny_policy) -> Path:
    """The saved random policy."""
    return tiny_policy


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_under_zero_3_the_reference_has_the_dtype_asked_for(
    tiny_policy, sharded, precision, dtype, tmp_path, monkeypatch
):
    seen = []
    start = dpo.training.frozen.deepspeed_engine.start_frozen

    def looked(module, config):
        seen.extend({str(p.dtype) for p in module.parameters()})
        return start(module, config)

    monkeypatch.setattr(dpo.training.frozen.deepspeed_engine, "start_frozen", looked)
    flags = ["--config", sharded, "--train.precision", precision, "--reference.dtype", dtype]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert seen == [{"bf16": "torch.bfloat16", "fp32": "torch.float32"}[dtype]]


def test_the_dtype_of_final_does_not_reach_into_training(tiny_policy, tmp_path):
    runs = []
    for dtype in ("auto", "bf16"):
        folder = tmp_path / dtype
        flags = ["--train.sft_epochs", "1", "--train.export_dtype", dtype]
        assert train_dpo.main(arguments(folder, tiny_policy, *flags)) == 0
        runs.append([line["loss"] for line in read_lines(folder / "run") if "loss" in line])
        assert json.loads((folder / "run/reference/config.json").read_text())["dtype"] == "float32"
    assert runs[0] == runs[1]


@pytest.mark.parametrize("recipe", ["one_gpu_16gb", "quickstart"])
def test_a_login_node_without_a_gpu_prepares_runs_of_any_precision(recipe, tiny_policy, tmp_path, capsys):
    lengths = ["--data.max_length", "128", "--data.max_prompt_length", "64"]
    flags = ["--recipe", f"recipes/{recipe}.yaml", "--data.validation", "builtin:world", "--prepare_only", *lengths]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert "Prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data.validation_split", "nope"], "data.validation_split is nope but data.train"),
        (["--log.backends", "[trackio]"], "log.backends names trackio, which is not installed; pip install trackio"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(flags, line, tiny_policy, tmp_path, capsys):
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("precision", "device", "supported", "slower", "said"),
    [
        ("bf16", "cpu", False, False, "many times slower than fp32"), ("bf16", "cpu", True, False, None),
        ("bf16", "cpu", False, True, "multiplied in fp32"), ("bf16", "cpu", True, True, "multiplied in fp32"),
        ("fp32", "cpu", False, True, None), ("bf16", "cuda", False, True, None),
    ],
)  # fmt: skip
def test_how_a_cpu_computes_bf16_is_said(precision, device, supported, slower, said, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(products, "fp32_is_faster", lambda: slower)
    notes = dpo.run.prepare._precision_notes(precision, torch.device(device))
    assert len(notes) == (said is not None) and all(said in note for note in notes)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_lengths_at_which_a_pairs_score_would_follow_its_neighbours_are_refused(kind, tiny_policy, tmp_path, capsys):
    """Such rotary embeddings choose their frequencies by the longest sequence of a batch."""
    start = tmp_path / "start"
    shutil.copytree(tiny_policy, start)
    config = json.loads((start / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        config["rope_parameters"] |= factors | {"original_max_position_embeddings": 64}
    else:
        config["max_position_embeddings"] = 64
    (start / "config.json").write_text(json.dumps(config))
    assert steady_length(transformers.AutoConfig.from_pretrained(start)) == 64
    assert train_dpo.main(arguments(tmp_path, start, "--data.max_length", "65")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = {"longrope": "beyond 64 tokens this model's rotary embedding follows the longest sequence of a batch"}
    assert said.get(kind, "data.max_length is 65, the model's context 64 tokens") in line


def test_a_special_token_beyond_the_embedding_is_no_obstacle_unless_the_data_has_it(tiny_policy, tmp_path, capsys):
    """As the token for images in the tokenizer of Gemma-3's models for text."""
    start = tmp_path / "start"
    shutil.copytree(tiny_policy, start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    rows = transformers.AutoConfig.from_pretrained(start).vocab_size
    assert len(tokenizer) == rows
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(start)
    assert train_dpo.main(arguments(tmp_path, start)) == 0
    data = tmp_path / "images.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [
        {"prompt": "Look:", "chosen": f" a cat {i}", "rejected": f" an <image> {i}"} for i in range(12)
    ]))  # fmt: skip
    flags = ["--data.train", str(data), "--train.output_dir", str(tmp_path / "other"), "--log.samples", "0"]
    assert train_dpo.main(arguments(tmp_path, start, *flags)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "row 1 of the data has '<image>', and the policy has no embedding for it; leave it out" in line
    tokenizer.pad_token = "<image>"  # with which samples are padded
    tokenizer.save_pretrained(start)
    assert train_dpo.main(arguments(tmp_path / "pad", start)) == 2
    assert f"model.tokenizer has {rows + 1} tokens, the policy {rows}" in capsys.readouterr().err


def test_policy_and_reference_compute_logits_over_the_same_padded_vocabulary(tiny_policy, tmp_path, monkeypatch):
    found, start = [], dpo.train.start_models

    def started(*args):
        policy, reference = start(*args)
        found.append((policy.scorer.head.multiple, reference.scorer.head.multiple))
        return policy, reference

    monkeypatch.setattr(dpo.train, "start_models", started)
    flags = ["--model.vocabulary_multiple", "64", "--log.samples", "0", "--train.max_steps", "1"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert found == [(64, 64)]


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_computes_in_bf16_if_it_has_it_and_else_in_fp16(has_bf16, expected, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert resolve_precision("auto", gpu) == expected and resolve_precision("auto", cpu) == "fp32"
    assert resolve_precision("fp16", gpu) == "fp16" and resolve_precision("bf16", cpu) == "bf16"
    with pytest.raises(UserError, match="train.precision is fp16 on a CPU"):
        resolve_precision("fp16", cpu)


@pytest.mark.parametrize(
    ("wanted", "device", "sharded", "mode", "expected"),
    [
        ("auto", "cuda", False, "online", torch.float16), ("auto", "cuda", True, "online", torch.bfloat16),
        ("auto", "cuda", False, "cached", torch.bfloat16), ("auto", "cuda", False, "adapter", torch.bfloat16),
        ("auto", "cpu", False, "online", torch.bfloat16), ("policy", "cuda", False, "online", torch.bfloat16),
        ("fp32", "cuda", False, "cached", torch.float32),
    ],
)
def test_the_reference_is_in_fp16_on_a_gpu_unless_something_stands_against_it(wanted, device, sharded, mode, expected):
    found, _ = reference_dtype(wanted, torch.bfloat16, torch.device(device), sharded=sharded, mode=mode)
    assert found == expected


@pytest.mark.parametrize(
    ("dtype", "of_token", "of_chosen", "stops"),
    [
        ("fp16", 0.04, 0.0, False), ("fp16", 0.06, 0.0, True),  # the same for both sides: the loss hardly moves
        ("fp16", 0.0, 0.8, False), ("fp16", 0.0, 1.4, True),  # 0.05 x beta of the loss, next to nothing a token
        ("fp32", 0.0, 1e-2, True), ("fp32", 0.0, 0.0, False),
    ],
)
def test_a_start_far_from_the_reference_is_stopped(
    dtype, of_token, of_chosen, stops, tiny_policy, tmp_path, monkeypatch, capsys
):
    start = dpo.train.start_models

    def apart(*args):
        policy, reference = start(*args)

        def shifted(batch):
            logps = own(batch)
            chosen, rejected = (x + of_token * n for x, n in ((logps.chosen, logps.chosen_lengths),
                                                              (logps.rejected, logps.rejected_lengths)))  # fmt: skip
            return replace(logps, chosen=chosen + of_chosen, rejected=rejected)

        own, reference.of_training = reference.of_training, shifted
        return policy, reference

    monkeypatch.setattr(dpo.train, "start_models", apart)
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Say it:", "chosen": "a" * 50, "rejected": "b" * 50}
    rows.write_text("".join(json.dumps(row | {"prompt": f"Say {i}:"}) + "\n" for i in range(8)))
    flags = ["--reference.dtype", dtype, "--data.train", str(rows), "--log.samples", "0", "--train.max_steps", "1"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == (2 if stops else 0)
    said = capsys.readouterr().err
    assert ("the start is not honest: loss" in said) is stops and "policy and reference differ by" in said


def test_a_run_goes_back_to_the_checkpoint_that_is_named_and_ends_as_it_did(tiny_policy, tmp_path):
    flags = ["--train.epochs", "2", "--train.max_steps", "4", "--train.save_every", "1", "--log.samples", "0"]
    more, run = ["--train.keep_checkpoints", "9", "--optim.lr", "1e-3"], tmp_path / "run"
    argv = arguments(tmp_path, tiny_policy, *flags, *more)
    assert train_dpo.main(argv) == 0
    before = numbers(run), weights(run)
    (run / "finished.json").unlink()
    assert train_dpo.main([*argv, "--train.resume", str(run / "checkpoints/step-000002")]) == 0
    assert (numbers(run), weights(run)) == before
    assert [line["step"] for line in before[0] if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("flag", ["--dry_run", "--prepare_only"])
def test_two_ranks_plan_together_say_it_once_and_write_nothing(flag, tiny_policy, tmp_path):
    done = ranks.run(["train_dpo.py", *arguments(tmp_path, tiny_policy, flag)], ranks=2, timeout=120)
    assert done.codes == [0, 0], done.output
    assert done.output.count("optimizer steps") == 1 and not (tmp_path / "run").exists()


def test_a_run_remarks_upon_a_beta_that_is_far_from_usual(tiny_policy, tmp_path, capsys):
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "--loss.name", "simpo", "--prepare_only")) == 0
    assert "loss.beta is 0.1 with loss.name simpo" in capsys.readouterr().out


# --- what a killed or failed start leaves for the next one -----------------------------------------------------------


def test_an_evaluation_without_its_files_has_no_line_and_is_made_again(builtin, tmp_path, monkeypatch):
    flags = ["--log.samples", "2", "--log.sample_every", "1"]
    for module, name, key in ((dpo.preference, "keep_evaluation", "eval_loss"),
                              (dpo.training.finish, "write_samples", "samples/kl")):  # fmt: skip
        write = getattr(module, name)

        def dies(*args: object, write=write) -> None:
            if args[1] == 1:
                raise KeyboardInterrupt
            write(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, dies)
            train_dpo.main(arguments(tmp_path, builtin, *flags, "--train.eval_every", "1"))
        assert [line["step"] for line in read_lines(tmp_path / "run") if key in line] == [0] * (key == "eval_loss")
        assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "preempted"
    assert train_dpo.main(arguments(tmp_path, builtin, *flags, "--train.eval_every", "1")) == 0
    assert [line["step"] for line in read_lines(tmp_path / "run") if "samples/kl" in line] == [1, 2]


def test_destroyed_weights_are_no_result_however_often_the_run_is_started(builtin, tmp_path, capsys):
    """The checkpoint of step 1 has them already, and a start that finds it takes no step before final/."""
    flags = ["--optim.lr", "1e18", "--optim.warmup_steps", "0", "--log.samples", "0", "--train.save_every", "1"]
    assert train_dpo.main(arguments(tmp_path, builtin, *flags, "--train.eval_every", "9")) == 2
    assert (tmp_path / "run/checkpoints/step-000001").is_dir()
    for _ in range(2):
        assert train_dpo.main([*arguments(tmp_path, builtin, *flags), "--train.max_steps", "1"]) == 2
        assert "the validation loss after step 1 is nan" in capsys.readouterr().err
    assert not (tmp_path / "run/final").exists()


def test_steps_since_the_last_line_are_told_where_no_further_step_follows(builtin, tmp_path, monkeypatch):
    flags = ["--train.epochs=2", "--train.max_steps=3", "--train.save_every=2", "--log.every=10", "--log.samples=0"]
    take = dpo.preference.take_step

    def killed(*args):
        if args[4].step == 2:
            raise KeyboardInterrupt
        return take(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo.preference, "take_step", killed)
        train_dpo.main(arguments(tmp_path, builtin, *flags))
    assert train_dpo.main([*arguments(tmp_path, builtin, *flags), "--train.max_steps", "2"]) == 0
    (line,) = [line for line in read_lines(tmp_path / "run") if "loss" in line]
    whole = tmp_path / "whole"
    assert train_dpo.main([*arguments(whole, builtin, *flags), "--train.max_steps", "2"]) == 0
    (truth,) = [line for line in read_lines(whole / "run") if "loss" in line]
    assert [line[key] for key in ("step", "num_tokens")] == [truth[key] for key in ("step", "num_tokens")]
    assert line["loss"] == pytest.approx(truth["loss"], abs=1e-3)  # of 3 steps the second has another learning rate
    assert f"`{truth['num_tokens']:,}`" in (tmp_path / "run/final/README.md").read_text()


def test_what_there_is_to_go_on_from_is_looked_for_once_no_other_process_writes_the_run(builtin, tmp_path, monkeypatch):
    """Another process finishes SFT and the first step while this one reads its data."""
    flags = ["--train.sft_epochs", "1", "--train.save_every", "1", "--log.samples", "0", "--train.keep_checkpoints=1"]
    opened, was_done, run_sft, stages = dpo.train.run_directory.opened, [], dpo.train.run_sft, []
    monkeypatch.setattr(dpo.train, "run_sft", lambda *args: (stages.append("sft"), run_sft(*args)))

    def later(config, world):
        if not was_done:
            was_done.append(True)
            assert train_dpo.main([*arguments(tmp_path, builtin, *flags), "--train.max_steps", "1"]) == 0
        return opened(config, world)

    monkeypatch.setattr(dpo.train.run_directory, "opened", later)
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 0
    lines = read_lines(tmp_path / "run")
    assert stages == ["sft"] and [line["sft_step"] for line in lines if "sft_loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_checkpoints_of_an_sft_that_is_done_do_not_outlive_the_next_start(builtin, tmp_path, monkeypatch):
    flags = ["--train.sft_epochs", "1", "--train.save_every", "1", "--log.samples", "0"]

    def dies(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dpo.sft, "drop_checkpoints", dies)
        train_dpo.main(arguments(tmp_path, builtin, *flags))
    kept = tmp_path / "run/checkpoints"
    assert list(kept.glob("sft-*")) and (tmp_path / "run/reference").is_dir()
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 0
    assert sorted(folder.name for folder in kept.iterdir()) == ["step-000001", "step-000002"]


def test_memory_that_samples_lack_makes_no_micro_batch_smaller(builtin, tmp_path, monkeypatch, capsys):
    flags = ["--log.sample_every", "1"]

    def lacks(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dpo.training.finish, "answers_to", lacks)
    assert train_dpo.main(arguments(tmp_path, builtin, *flags)) == 2
    said = capsys.readouterr().err
    assert "out of memory in the samples after step 1; lower log.samples or log.sample_tokens" in said


def test_lines_that_trackers_cannot_take_up_end_all_ranks_alike(builtin, tmp_path):
    flags = ["--log.backends", "[tensorboard]", "--log.samples", "0"]
    argv = arguments(tmp_path, builtin, *flags)
    assert train_dpo.main([*argv, "--train.max_steps", "1"]) == 0
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text('{"step": 0, "lo\n' + metrics.read_text())
    done = ranks.run(["train_dpo.py", *argv], ranks=2)
    assert done.codes == [2, 2] and "Traceback" not in done.output, done.output[-2000:]


@pytest.mark.parametrize(("rank", "left"), [("0", signal.default_int_handler), ("1", signal.SIG_DFL)])
def test_a_signal_before_a_run_listens_is_one_line_on_the_first_rank(rank, left, monkeypatch, capsys):
    """A rank that waits in a collective hears no handler: there the signal ends the process."""
    monkeypatch.setenv("RANK", rank)
    before, seen = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}, []

    def main(argv):
        seen.extend(signal.getsignal(number) for number in before)
        if rank == "0":
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(train_dpo, "main", main)
    try:
        code = train_dpo._interruptible([])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [left, left] and code == (75 if rank == "0" else 0)
    assert capsys.readouterr().err == "train_dpo.py: interrupted; start again to continue\n" * (rank == "0")


def test_evaluations_of_sets_smaller_than_the_ranks_end_under_zero_3(builtin, sharded, tmp_path):
    """A rank has nothing but dummies there, and others wait for its share of the weights."""
    for name in ("a", "b"):
        row = {"prompt": f"Say {name}:", "chosen": " yes", "rejected": " no"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    sets = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")]
    flags = ["--data.validation", json.dumps(sets), "--data.validation_limit", "null", "--log.samples", "0"]
    flags += ["--train.eval_every", "1", "--config", sharded]
    done = ranks.run(["train_dpo.py", *arguments(tmp_path, builtin, *flags)], ranks=2, timeout=120)
    assert done.codes == [0, 0], done.output[-3000:]
    assert [line["step"] for line in read_lines(tmp_path / "run") if "eval_b_loss" in line] == [0, 1, 2]


def test_whoever_may_read_a_folder_may_read_its_weights(builtin, tmp_path):
    assert train_dpo.main(arguments(tmp_path, builtin, "--train.sft_epochs", "1", "--log.samples", "0")) == 0
    for name in ("final", "reference"):
        modes = {file.stat().st_mode for file in (tmp_path / "run" / name).iterdir()}
        assert len(modes) == 1 and (tmp_path / "run" / name / "model.safetensors").is_file()
