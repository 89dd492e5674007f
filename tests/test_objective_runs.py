"""Whole runs under other losses than DPO: no reference, caches, resumes, refusals, dishonest starts."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import dpo.plan
import dpo.training.frozen
import train_dpo
from dpo.commandline import parse
from dpo.errors import UserError
from dpo.report.pairs import read_pairs
from dpo.runtime import distributed
from dpo.runtime.tracking import read_lines
from dpo.training.start import rounds_apart
from dpo.types import LogitMap
from tests import tiny
from tests.invariants import run_losses


def arguments(folder: Path, policy: object, name: str, *more: str) -> list[str]:
    """A short run on the built-in data in which the loss moves."""
    return [
        "--config", "ds_configs/zero2.json", "--model.policy", str(policy), "--data.train", "builtin:world",
        "--data.train_limit", "8", "--data.validation_limit", "4", "--data.cache_dir", str(folder / "cache"),
        "--train.global_batch_size", "4", "--train.max_steps", "4", "--train.epochs", "2", "--train.save_every", "2",
        "--train.output_dir", str(folder / name), "--log.samples", "1", "--log.sample_tokens", "2",
        "--optim.lr", "3e-3", "--optim.schedule", "constant", "--optim.warmup_steps", "0", *more,
    ]  # fmt: skip


def losses_of(folder: Path) -> list[float]:
    """Of training and evaluation, in the order of the lines."""
    return [line[name] for line in read_lines(folder) for name in ("loss", "eval_loss") if name in line]


def test_a_run_without_a_reference_answers_its_samples_by_the_policy_as_it_started(tiny_policy, tmp_path, capsys):
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "simpo", "--loss.name", "simpo", "--loss.beta", "2")) == 0
    said = capsys.readouterr().err
    assert "reference: none (the loss needs none)" in said and "no reference to compare with" in said
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "dpo")) == 0
    answers = [json.loads((tmp_path / n / "samples.jsonl").read_text())["reference"] for n in ("simpo", "dpo")]
    assert answers[0] == answers[1]
    card = (tmp_path / "simpo" / "final" / "README.md").read_text()
    assert "under the objective `simpo`" in card and "over the reference" not in card
    assert "Direct Preference Optimization" in (tmp_path / "dpo" / "final" / "README.md").read_text()
    known = [read_pairs(tmp_path / name)[1]["reference_chosen_logps"] for name in ("simpo", "dpo")]
    assert np.isnan(known[0]).all() and (known[1] < 0).all()
    losses = losses_of(tmp_path / "simpo")
    assert losses[-1] < losses[0] - 0.01


def test_a_run_past_its_best_says_so_at_its_end(tiny_policy, tmp_path, capsys):
    flags = ["--train.eval_every", "1", "--optim.lr", "0.05", "--optim.schedule", "constant", "--loss.beta", "5"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "wild", *flags)) == 0
    said = capsys.readouterr().err
    losses = [line["eval_loss"] for line in read_lines(tmp_path / "wild") if "eval_loss" in line]
    assert losses[-1] > 1.02 * min(losses), "the run is not wild enough"
    assert "DPO: before and after" in said
    assert ("Validation loss never fell below" if min(losses) == losses[0] else "Validation loss was lowest") in said


@pytest.mark.parametrize("name", ["beta_dpo", "sampo"])
def test_a_continued_run_takes_up_what_the_loss_carries_from_step_to_step(tiny_policy, tmp_path, name):
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "whole", "--loss.name", name)) == 0
    for steps in ("2", "4"):
        again = arguments(tmp_path, tiny_policy, "broken", "--loss.name", name, "--train.max_steps", steps)
        assert train_dpo.main(again) == 0
    whole, broken = (
        {line["step"]: line["loss"] for line in read_lines(tmp_path / run) if "loss" in line}
        for run in ("whole", "broken")
    )
    assert broken == whole and len(whole) == 4
    assert abs(whole[4] - whole[1]) > 0.01


def test_each_loss_of_a_sum_has_a_curve_of_its_own_which_a_stop_between_two_lines_leaves_whole(tiny_policy, tmp_path):
    flags = ["--loss.name", "[sigmoid, sft]", "--loss.weights", "[1, 0.2]", "--log.every", "4"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "whole", *flags)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoints/step-000004")
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "broken", *flags)) == 0
    whole, broken = read_lines(tmp_path / "whole"), read_lines(tmp_path / "broken")
    for prefix in ("", "eval_"):
        found = [line for line in whole if f"{prefix}loss" in line]
        assert found
        for line in found:
            parts = line[f"{prefix}loss/sigmoid"], line[f"{prefix}loss/sft"]
            assert line[f"{prefix}loss"] == pytest.approx(parts[0] + 0.2 * parts[1], rel=1e-6) and parts[1] > 1
    names = ("step", "loss", "loss/sigmoid", "loss/sft", "num_tokens")
    first, again = ([line[name] for name in names] for run in (whole, broken) for line in run if "loss" in line)
    assert again == pytest.approx(first, rel=1e-12) and again[0] == 4


def test_cached_scores_of_weighted_tokens_equal_those_of_an_online_reference(tiny_policy, tmp_path):
    flags = {"online": ["--loss.ld_alpha", "0.3"], "cached": ["--loss.ld_alpha", "0.3"], "whole": []}
    for name, more in flags.items():
        mode = "online" if name == "online" else "cached"
        assert train_dpo.main(arguments(tmp_path, tiny_policy, name, "--reference.mode", mode, *more)) == 0
    online, cached, whole = (losses_of(tmp_path / name) for name in flags)
    assert cached == pytest.approx(online, abs=1e-5)
    assert abs(whole[-1] - cached[-1]) > 1e-4
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 4  # training and validation, with and without


@pytest.mark.parametrize(
    ("flags", "reference_bytes"),
    [(["--loss.name", "aot"], 4), (["--loss.name", "simpo"], 0), (["--reference.mode", "cached"], 0)],
)
def test_a_dry_run_tries_losses_that_couple_pairs_or_need_no_reference_and_scores_nothing_to_cache(
    tiny_policy, tmp_path, capsys, monkeypatch, flags, reference_bytes
):
    seen, memory = [], dpo.plan.memory

    def counted(*args: Any, **kwargs: Any) -> dict[str, float]:
        seen.append(kwargs["reference_bytes"])
        return memory(*args, **kwargs)

    monkeypatch.setattr(dpo.plan, "memory", counted)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "plan", *flags, "--dry_run")) == 0
    assert "costliest micro-batch" in capsys.readouterr().out
    assert seen == [reference_bytes] and not (tmp_path / "cache/reference").exists()


def test_tdpo_is_refused_under_zero_3_before_anything_is_written(tiny_policy, tmp_path, capsys):
    flags = ["--loss.name", "tdpo", "--config", "ds_configs/zero3.json"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "run", *flags)) == 2
    assert "loss.name tdpo needs whole weights of the reference, ZeRO-3 shards them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--loss.name", "tdpo"], ["--loss.wpo", "true"], ["--model.loss_in_forward", "true"],
        ["--config", "ds_configs/zero3.json", "--train.precision", "bf16"],
    ],
    ids=["tdpo", "wpo", "in_forward", "zero3"],
)  # fmt: skip
def test_models_that_scale_or_cap_their_logits_start_at_ln_2_and_learn(family, flags, tiny_policy, tmp_path, capsys):
    sizes = {"vocab_size": 300, "max_position_embeddings": 512}
    policy = tiny.saved(tmp_path / family, family, tokenizer=tiny_policy, **sizes)
    assert train_dpo.main(arguments(tmp_path, policy, "run", *flags)) == 0
    assert "own head" not in capsys.readouterr().err
    losses = losses_of(tmp_path / "run")
    if "--loss.wpo" in flags:
        assert 0 < losses[0] < 0.69  # ln 2, times the pairs' weights
    else:
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3


@pytest.mark.parametrize("flags", [["--loss.name", "tdpo"], ["--loss.wpo", "true"]])
def test_a_head_that_is_no_matrix_product_is_refused_where_whole_distributions_are_needed(
    tiny_policy, tmp_path, capsys, flags, monkeypatch
):
    monkeypatch.setattr("dpo.model.forward.logit_map_of", lambda _: LogitMap())
    policy = tiny.saved(tmp_path / "cohere", "cohere", tokenizer=tiny_policy, vocab_size=300)
    assert train_dpo.main(arguments(tmp_path, policy, "run", *flags)) == 2
    assert "is for models whose logits are a matrix product" in capsys.readouterr().err


def test_a_reference_with_other_tokens_is_refused_where_distributions_are_compared(tiny_policy, tmp_path, capsys):
    vocabulary = transformers.AutoConfig.from_pretrained(tiny_policy).vocab_size
    other = tiny.saved(tmp_path / "other", "llama", tokenizer=tiny_policy, vocab_size=vocabulary + 3)
    flags = ["--loss.name", "tdpo", "--reference.path", str(other)]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "run", *flags)) == 2
    expected = f"{other} has {vocabulary + 3} tokens, the policy {vocabulary}; use a reference with the policy's tokens"
    assert expected in capsys.readouterr().err


def test_a_list_of_losses_is_read_from_a_recipe(tmp_path):
    recipe = tmp_path / "rpo.yaml"
    recipe.write_text(
        "model: {policy: 'builtin:tiny'}\ndata: {train: 'builtin:world'}\n"
        "loss: {name: [sigmoid, sft], weights: [1, 0.5]}\n"
    )
    loss = parse(["--recipe", str(recipe)]).config.loss
    assert loss.names == ("sigmoid", "sft") and loss.weights_of_names == (1.0, 0.5)
    assert parse(["--recipe", str(recipe), "--loss.name", "simpo", "--loss.weights", "null"]).config.loss.names == (
        "simpo",
    )


MOVED: dict[str, dict[str, Any]] = {
    "sigmoid": {}, "rpo": {"name": ("sigmoid", "sft")}, "wpo": {"wpo": True}, "aot": {"name": "aot"},
    "tdpo": {"name": "tdpo"}, "sampo": {"name": "sampo"}, "apo_zero": {"name": "apo_zero"},
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
def test_a_policy_that_is_not_its_reference_is_stopped_under_every_kind_of_loss(monkeypatch, case):
    model = tiny.model("llama", dtype=torch.float32)
    copies = dpo.training.frozen.load.frozen_copy

    def moved(*args: Any) -> Any:
        copied = copies(*args)
        with torch.no_grad():
            copied.lm_head.weight.mul_(1.05)
        return copied

    monkeypatch.setattr(dpo.training.frozen, "load_weights", lambda *_, **__: copy.deepcopy(model))
    monkeypatch.setattr(dpo.training.frozen.load, "frozen_copy", moved)
    pairs = tiny.Pairs(tiny.pairs(run_losses.PAIRS_A_STEP, longest=9))
    with pytest.raises(UserError, match="the start is not honest: loss"):
        run_losses.run(
            {"loss": MOVED[case], "layout": "shared", "micro_batches": 3}, distributed.start(), pairs
        )


@pytest.mark.parametrize(
    ("dtype", "of_reference", "device", "compiled", "cached", "apart"),
    [
        (torch.bfloat16, torch.bfloat16, "cuda", False, False, False),
        (torch.bfloat16, torch.float16, "cuda", False, False, True),
        (torch.bfloat16, torch.bfloat16, "cuda", True, False, True),
        (torch.float16, torch.float16, "cuda", False, True, True),
        (torch.float32, torch.float32, "cuda", True, True, False),
        (torch.bfloat16, torch.bfloat16, "cpu", True, True, True),
        (torch.bfloat16, torch.bfloat16, "cpu", False, True, False),
    ],
)
def test_equal_models_may_round_apart_in_other_dtypes_batches_or_kernels(
    dtype, of_reference, device, compiled, cached, apart
):
    setup: Any = SimpleNamespace(
        dtype=dtype, config=SimpleNamespace(model=SimpleNamespace(compile=compiled)),
        world=SimpleNamespace(device=torch.device(device)),
    )  # fmt: skip
    reference: Any = SimpleNamespace(dtype=of_reference, scorer=None if cached else object())
    assert rounds_apart(setup, reference) is apart
