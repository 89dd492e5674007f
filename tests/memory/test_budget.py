"""Running out of memory at the start leads down one ladder on all ranks, changes no line, and is remembered.

Lack of memory is played on the CPU: torch.OutOfMemoryError wherever a micro-batch has more tokens than it may.
"""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import dpo.memory.budget
import dpo.model.forward
import dpo.preference
import dpo.sft
import train_dpo
from dpo.commandline import parse
from dpo.data.epochs import Epochs
from dpo.data.loader import Loader, StepBatches
from dpo.data.planner import Layout
from dpo.errors import UserError
from dpo.memory.budget import choose
from dpo.memory.room import Room, wanted_tokens
from dpo.model import blocks
from dpo.model.shape import Shape
from dpo.runtime.tracking import read_lines
from tests.test_stages import arguments


@pytest.mark.parametrize(
    ("limits", "may", "expected", "tried"),
    [
        ((1000, 0), True, (1000, False), [1000]),
        ((300, 0), True, (250, False), [1000, 500, 250]),
        ((100, 0), False, (100, False), [1000, 500, 250, 125, 100]),
        ((99, 600), True, (500, True), [1000, 500, 250, 125, 100, 1000, 500]),
        ((99, 99), True, None, [1000, 500, 250, 125, 100, 1000, 500, 250, 125, 100]),
        ((99, 0), False, None, [1000, 500, 250, 125, 100]),
    ],
)
def test_the_ladder_halves_down_to_the_longest_pair_then_recomputes_then_refuses(limits, may, expected, tried):
    seen, said, recomputed = [], [], []

    def fits(budget):
        seen.append(budget)
        return budget <= limits[len(recomputed)]

    def run():
        return choose(1000, 100, fits, (lambda: recomputed.append(1) or 1000) if may else None, said.append)

    if expected is None:
        with pytest.raises(UserError, match="out of memory with 100 tokens, the longest pair"):
            run()
    else:
        assert (run(), bool(recomputed)) == expected
    assert seen == tried
    assert len(said) == len(tried) - 1 and all("out of memory" in line for line in said)


SHAPE = Shape(
    parameters=10**6, body=10**6, layers=2, hidden=8, vocabulary=100, linear=10**6, attention_width=16,
    activations=1000, block_input=100, shared_activations=1100, last_mlp=0, keys_and_values=100,
    has_fused_experts=False, largest=800,
)  # fmt: skip
RESERVED = 2 * 10 * 100 * 4 + 100 * 8 * 4  # a tile of 10 rows twice, the head's gradient


def room(free: int, *, stage: int = 1, longest: int = 10, layout: Layout = "packed", trained: int = 10**6) -> Room:
    return Room(SHAPE, torch.bfloat16, free, stage, trained, longest, layout, chunk_rows=10)


def first(free: int, *, recomputed: bool = False, **more: Any) -> int:
    return room(free, **more).budget(recomputed=recomputed)


def test_the_first_budget_follows_free_memory_within_bounds():
    assert first(10_000_000 + RESERVED + 2 * 10**6) == 7168
    assert first(10_000_000 + RESERVED + 2 * 10**6, recomputed=True) == 13312  # 100 + 1000 / 2 bytes a token
    assert first(10**12) == 65536 and first(1000, longest=700) == 700
    assert first(10_000_000 + RESERVED, stage=2) == 7168  # gradients are handed on
    assert first(10_000_000 + RESERVED + 2 * 10**6, stage=3) == 7168
    assert first(10**12, stage=3) == 16384
    assert first(10_000_000 + RESERVED - 400 + 2 * 700, trained=700) == 7168  # adapters


def test_the_keys_and_values_of_shared_prompts_come_out_of_the_first_budget():
    free = 10_000_000 + RESERVED + 2 * 10**6
    assert first(free, layout="shared") == 6144  # 1100 + 100 bytes a token
    assert first(free, layout="shared", recomputed=True) == 11264  # 100 + (1100 + 100) / 2


def test_activations_are_kept_where_the_wanted_tokens_and_the_longest_pair_fit_with_them():
    asks = lambda tokens, wanted, **more: room(  # noqa: E731
        int(tokens * 1000 / 0.8) + RESERVED + 2 * 10**6, **more
    ).asks_for_recomputation(wanted)
    assert not asks(3001, 3000) and asks(2999, 3000)
    assert asks(8999, 3000, longest=9000) and not asks(9001, 3000, longest=9000)
    assert asks(4499, 3000, stage=3) and not asks(4501, 3000, stage=3)  # nothing is tried there
    unknown, experts = (
        replace(SHAPE, activations=None, shared_activations=None), replace(SHAPE, has_fused_experts=True)
    )  # fmt: skip
    for shape in (unknown, experts):
        assert not replace(room(10**12), shape=shape).asks_for_recomputation(10)  # the trial shows it
        assert replace(room(10**12, stage=3), shape=shape).asks_for_recomputation(10)
        assert replace(room(10**12), ranks_a_row=2, shape=shape).asks_for_recomputation(10)


@pytest.mark.parametrize(
    ("flags", "ranks", "stage", "wanted"),
    [
        ([], 1, 2, 8192), ([], 1, 3, 16384), (["--train.tokens_per_micro_batch", "30000"], 1, 3, 30000),
        (["--train.micro_batch_size", "7"], 1, 2, 700), (["--train.global_batch_size", "4"], 1, 2, 4 * 100),
        (["--train.global_batch_size", "4", "--train.tokens_per_micro_batch", "300"], 1, 2, 300),
        (["--train.global_batch_size", "9"], 8, 2, 2 * 100),  # the fullest rank's
    ],
)
def test_no_more_tokens_are_wanted_than_are_asked_for_keep_a_gpu_busy_or_are_there(flags, ranks, stage, wanted):
    argv = ["--model.policy", "p", "--data.train", "d", "--train.global_batch_size", "1000", *flags]
    config, lengths = parse(argv).config, np.full((1000, 3), [20, 40, 40])
    pairs, epochs = SimpleNamespace(lengths=lengths), Epochs(1000, config.train.global_batch_size, 0)
    setup = SimpleNamespace(
        config=config, train_pairs=pairs, epochs=epochs,
        loader=lambda pairs, layout: Loader(pairs, epochs, 0, ranks, layout, 16384),
        heaviest_steps=lambda layout: [0], longest_row=lambda layout: 100, zero_stage=stage, ranks_a_row=1,
    )  # fmt: skip
    assert wanted_tokens(setup, "shared") == wanted


class Tried(list):
    """Budgets that were tried, and how many tokens the micro-batch of the last trial had."""

    row = 0


def lacking_above(monkeypatch, tokens, recomputed_tokens, error=lambda: torch.OutOfMemoryError("CUDA out of memory")):
    """Out of memory, in the middle of a forward pass, above so many tokens."""
    monkeypatch.setattr(dpo.memory.budget, "can_run_out", lambda device: True)
    monkeypatch.setattr(dpo.memory.budget, "_free_memory", lambda device: 10**12)
    original, tried = dpo.memory.budget.attempt, Tried()

    def attempt(setup, policy, reference):
        tried.append(setup.token_budget)
        layer = policy.scorer.model.model.layers[0]

        def lack(module, inputs):
            limit = recomputed_tokens if layer.gradient_checkpointing else tokens
            tried.row = inputs[0].shape[1]
            if inputs[0].shape[1] > limit:
                raise error()

        handle = layer.register_forward_pre_hook(lack)
        try:
            original(setup, policy, reference)
        finally:
            handle.remove()

    monkeypatch.setattr(dpo.memory.budget, "attempt", attempt)
    return tried


SEVERAL = ["--log.samples", "0", "--train.tokens_per_micro_batch", "1600", "--optim.lr", "1e-3"]


def lines_of(folder):
    return [line for line in read_lines(folder / "run") if "loss" in line]


@pytest.mark.parametrize(
    ("limits", "in_forward", "found"), [((450, 450), "false", (400, False)), ((10, 900), "true", (800, True))]
)
def test_a_run_without_enough_memory_takes_smaller_micro_batches_and_has_the_same_lines(
    limits, in_forward, found, tiny_policy, tmp_path, monkeypatch, capsys
):
    flags = [*SEVERAL, "--model.loss_in_forward", in_forward]
    assert train_dpo.main(arguments(tmp_path / "plain", tiny_policy, *flags)) == 0
    assert not (tmp_path / "plain/run/micro_batches.json").exists()
    tried = lacking_above(monkeypatch, *limits)
    assert train_dpo.main(arguments(tmp_path / "small", tiny_policy, *flags)) == 0
    assert "out of memory with 1,600 tokens a micro-batch: trying 800" in capsys.readouterr().err
    written = json.loads((tmp_path / "small/run/micro_batches.json").read_text())
    assert (tried[-1], written["recomputed"]) == found and 0 < written["tokens"] == tried.row <= found[0]
    assert (written["asked"], written["world_size"], written["evaluation"]) == (1600, 1, found[0])
    for a, b in zip(lines_of(tmp_path / "small"), lines_of(tmp_path / "plain"), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    tried.clear()
    more = ["--train.max_steps", "3", "--train.epochs", "2"]
    assert train_dpo.main(arguments(tmp_path / "small", tiny_policy, *flags, *more)) == 0
    assert tried == []
    assert json.loads((tmp_path / "small/run/micro_batches.json").read_text()) == written


def runs_out(monkeypatch, stage, step):
    """Memory that runs out in a step, once."""
    module, name = (dpo.preference, "take_step") if stage == "dpo" else (dpo.sft, "_step")
    original, lacks = getattr(module, name), [True]

    def lacking(*args):
        if lacks and next(arg for arg in args if isinstance(arg, StepBatches)).step + 1 == step:
            lacks.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args)

    monkeypatch.setattr(module, name, lacking)


@pytest.mark.parametrize(("stage", "name"), [("dpo", "micro_batches.json"), ("sft", "sft_micro_batches.json")])
def test_a_run_that_runs_out_of_memory_later_goes_on_with_smaller_micro_batches(
    stage, name, tiny_policy, tmp_path, monkeypatch, capsys
):
    flags = [*SEVERAL, "--train.save_every", "1", *(["--train.sft_epochs", "1"] if stage == "sft" else [])]
    assert train_dpo.main(arguments(tmp_path / "plain", tiny_policy, *flags)) == 0
    tried = lacking_above(monkeypatch, 10**9, 10**9)
    runs_out(monkeypatch, stage, 2)
    argv = arguments(tmp_path / "run", tiny_policy, *flags)
    assert train_dpo.main(argv) == 2
    path = tmp_path / "run/run" / name
    written, row = json.loads(path.read_text()), tried.row
    assert written["tokens"] == written["evaluation"] == row // 2 and written["recomputed"] is False
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory waiting for the " in said and f"step 2 with micro-batches of {row:,} tokens; " in said
    assert f"start again: it goes on with {row // 2:,} ({name})" in said
    assert json.loads((tmp_path / "run/run/status.json").read_text())["state"] == "failed"
    tried.clear()
    assert train_dpo.main(argv) == 0
    assert f"micro-batches: at most {row // 2} tokens ({name})" in capsys.readouterr().err
    assert json.loads(path.read_text()) == written and (tried == []) is (stage == "dpo")
    for a, b in zip(lines_of(tmp_path / "run"), lines_of(tmp_path / "plain"), strict=True):
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(("checkpointing", "goes_on"), [("auto", True), ("false", False)])
def test_a_run_whose_longest_pair_fills_a_micro_batch_recomputes_next_or_says_what_to_do(
    checkpointing, goes_on, tiny_policy, tmp_path, monkeypatch, capsys
):
    lacking_above(monkeypatch, 10**9, 10**9)
    runs_out(monkeypatch, "dpo", 1)
    flags = ["--log.samples", "0", "--train.tokens_per_micro_batch", "1"]
    flags += ["--model.gradient_checkpointing", checkpointing]
    argv = arguments(tmp_path, tiny_policy, *flags)
    assert train_dpo.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert ("it goes on with activations recomputed" in said) is goes_on
    assert ("lower data.max_length" in said) is not goes_on
    assert train_dpo.main(argv) == 0
    assert json.loads((tmp_path / "run/micro_batches.json").read_text())["recomputed"] is goes_on
    assert ("activations recomputed" in capsys.readouterr().err) is goes_on


def test_a_dry_run_finds_its_budget_as_the_run_would_and_writes_nothing(tiny_policy, tmp_path, monkeypatch, capsys):
    tried = lacking_above(monkeypatch, 450, 450)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, "--dry_run")) == 0
    out, err = capsys.readouterr()
    assert tried == [1600, 800, 400] and f"micro-batches: at most {tried.row} tokens\n" in err
    assert int(re.search(r"costliest micro-batch\D+(\d+) tokens", out)[1]) == tried.row
    assert not (tmp_path / "run").exists()


def test_the_heaviest_step_of_the_run_is_tried_though_it_comes_last(tiny_policy, tmp_path, monkeypatch):
    """Rows sorted by length, in the order of the file: each of 40 steps is heavier than the one before."""
    rows = [{"prompt": "a" * (i + 1), "chosen": "b" * (i + 1), "rejected": "c" * (i + 2)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tried = lacking_above(monkeypatch, 10**9, 10**9)
    flags = ["--data.train", str(tmp_path / "rows.jsonl"), "--data.shuffle", "false", "--train.global_batch_size", "1"]
    more = [*SEVERAL, "--data.train_limit", "40", "--train.max_steps"]
    found = []
    for name, steps in (("all", "40"), ("dry", "1")):
        argv = arguments(tmp_path / name, tiny_policy, *flags, *more, steps, "--dry_run")
        assert train_dpo.main(argv) == 0
        found.append(tried.row)
    assert found[0] == found[1] >= 40 + 40 + 41


def test_blocks_are_compiled_once_it_is_known_that_activations_are_kept(tiny_policy, tmp_path, monkeypatch, capsys):
    lacking_above(monkeypatch, 10**9, 10**9)
    monkeypatch.setattr(dpo.memory.budget, "_free_memory", lambda device: 0)
    flags = [*SEVERAL, "--model.compile", "true", "--train.max_steps", "1"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert "blocks: not compiled: torch.compile leaves blocks alone whose activations are" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.gradient_checkpointing", "false"], ["--config", "ds_configs/zero1.json"],
        ["--train.micro_batch_size", "3"], ["--model.loss_in_forward", "true"],
    ],
)
def test_what_was_found_for_other_settings_is_looked_for_anew(flags, tiny_policy, tmp_path, monkeypatch):
    tried = lacking_above(monkeypatch, 10**9, 10**9)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, "--train.max_steps", "1")) == 0
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, *flags)) == 0
    assert tried == [1600, 1600]


@pytest.mark.parametrize("said", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when", "CUDA error: out of memory"])
def test_lack_of_memory_under_other_names_is_one_too_and_other_errors_are_not(said, tiny_policy, tmp_path, monkeypatch):
    tried = lacking_above(monkeypatch, 450, 450, lambda: RuntimeError(said))
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, "--train.max_steps", "1")) == 0
    assert tried == [1600, 800, 400]
    lacking_above(monkeypatch, 450, 450, lambda: RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train_dpo.main(arguments(tmp_path / "other", tiny_policy, *SEVERAL))


def test_a_run_that_ends_up_recomputing_says_that_its_blocks_are_no_longer_compiled(
    tiny_policy, tmp_path, monkeypatch, capsys
):
    lacking_above(monkeypatch, 10, 10**9)
    monkeypatch.setattr(blocks, "compile_blocks", lambda model: 2)
    flags = [*SEVERAL, "--model.compile", "true", "--train.max_steps", "1"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert re.search(r"blocks: 2 compiled[\s\S]*blocks: not compiled", capsys.readouterr().err)


def test_activations_of_a_model_that_cannot_recompute_them_are_kept(tiny_policy, tmp_path, monkeypatch):
    lacking_above(monkeypatch, 10**9, 10**9)
    monkeypatch.setattr(dpo.memory.budget, "_free_memory", lambda device: 0)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, "--train.max_steps", "1")) == 0
    assert json.loads((tmp_path / "run/micro_batches.json").read_text())["recomputed"] is False


def test_a_run_that_goes_on_recomputes_activations_again(tiny_policy, tmp_path, monkeypatch):
    lacking_above(monkeypatch, 10, 10**9)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL)) == 0
    seen, step = [], dpo.preference.take_step

    def looked(setup, policy, *rest):
        seen.append(blocks.recomputes_activations(policy.scorer.model))
        return step(setup, policy, *rest)

    monkeypatch.setattr(dpo.preference, "take_step", looked)
    more = ["--train.max_steps", "3", "--train.epochs", "2"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, *more)) == 0
    assert seen and all(seen)


@pytest.mark.parametrize("stage", [2, 3])
def test_auto_starts_from_the_memory_of_the_rank_with_the_least_and_tries_nothing_under_zero_3(
    stage, tiny_policy, tmp_path, monkeypatch
):
    """This rank's memory suggests more than the other's, 2,048 tokens; the other's costliest micro-batch has 2,000."""
    tried = lacking_above(monkeypatch, 10**9, 10**9)
    own, suggested = dpo.memory.budget.gather, []

    def gathered(value):
        if isinstance(value, bool) or value == 0:  # the size of its GPU
            return own(value)
        suggested.append(value)
        return [*own(value), 2048 if len(suggested) == 1 else 2000]

    monkeypatch.setattr(dpo.memory.budget, "_free_memory", lambda device: 150_000_000)
    monkeypatch.setattr(dpo.memory.budget, "gather", gathered)
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}))
    flags = ["--config", str(config), "--log.samples", "0", "--train.tokens_per_micro_batch", "auto"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert suggested[0] > 2048 and tried == ([2048] if stage == 2 else [])
    assert suggested[1:] == ([tried.row] if stage == 2 else []) and tried.row < 2000
    written = json.loads((tmp_path / "run/micro_batches.json").read_text())
    assert (written["asked"], written["tokens"]) == ("auto", 2000 if stage == 2 else 2048)


@pytest.mark.parametrize(
    ("wanted", "free", "other_lacks", "recomputed"),
    [
        ("auto", 10**12, False, False), ("auto", 0, False, True), ("auto", 10**12, True, True),
        ("false", 0, False, False),
    ],
)
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_activations_are_recomputed_where_any_rank_lacks_room_for_them_and_the_run_may(
    config, wanted, free, other_lacks, recomputed, tiny_policy, tmp_path, monkeypatch, capsys
):
    lacking_above(monkeypatch, 10**9, 10**9)
    own, asked = dpo.memory.budget.gather, []

    def gathered(value):
        if not isinstance(value, bool):
            return own(value)
        asked.append(value)
        return [*own(value), other_lacks and len(asked) == 1]

    monkeypatch.setattr(dpo.memory.budget, "gather", gathered)
    monkeypatch.setattr(dpo.memory.budget, "_free_memory", lambda device: free)
    flags = [*SEVERAL, "--config", f"ds_configs/{config}.json", "--model.gradient_checkpointing", wanted]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags, "--train.max_steps", "1")) == 0
    assert json.loads((tmp_path / "run/micro_batches.json").read_text())["recomputed"] is recomputed
    assert bool(re.search(r"at most [\d,]+ tokens, activations recomputed", capsys.readouterr().err)) is recomputed


def test_what_one_rank_lacks_is_lacking_on_all(tiny_policy, tmp_path, monkeypatch):
    """This rank has room; the other says that it had none with more than 500 tokens."""
    tried = lacking_above(monkeypatch, 10**9, 10**9)
    own = dpo.memory.budget.gather
    monkeypatch.setattr(dpo.memory.budget, "gather", lambda value: [*own(value), bool(tried) and tried[-1] > 500])
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL)) == 0
    assert tried == [1600, 800, 400]


@pytest.mark.parametrize(("config", "bytes_a_parameter"), [("zero2", 8 + 4), ("zero2_offload", 0)])
def test_the_trial_holds_beside_it_what_the_first_step_adds(
    config, bytes_a_parameter, tiny_policy, tmp_path, monkeypatch
):
    """AdamW's two states, the gradients in fp32 and the bucket that is reduced do not exist before it."""
    bucket = json.loads(Path(f"ds_configs/{config}.json").read_text())["zero_optimization"]["reduce_bucket_size"]
    lacking_above(monkeypatch, 10**9, 10**9)
    empty, attempt, kept = torch.empty, dpo.memory.budget.attempt, []

    def made(*size, **more):
        tensor = empty(*size, **more)
        if more.get("dtype") == torch.uint8:
            kept.append(weakref.ref(tensor))
        return tensor

    def watched(setup, policy, reference):
        sizes = [p.numel() for p in policy.scorer.parameters()]
        assert kept[-1]().numel() == bytes_a_parameter * sum(sizes) + 4 * bucket + 2 * 4 * max(sizes)
        attempt(setup, policy, reference)

    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(dpo.memory.budget, "attempt", watched)
    flags = [*SEVERAL, "--config", f"ds_configs/{config}.json"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert kept and not any(reference() is not None for reference in kept)


@pytest.mark.parametrize(("stage", "lora", "computed"), [(1, [], None), (2, [], 2), (2, ["--model.lora.r", "4"], None)])
def test_the_trial_passes_through_all_blocks_and_has_whole_gradients_where_a_step_has(
    stage, lora, computed, tiny_policy, tmp_path, monkeypatch
):
    """Under ZeRO-2 those of the embedded tokens and of the head alone, unless few weights learn."""
    lacking_above(monkeypatch, 10**9, 10**9)
    attempt, grad, passed, found = dpo.memory.budget.attempt, torch.autograd.grad, set(), []

    def watched(setup, policy, reference):
        layers = policy.scorer.model.model.layers

        def through(index):
            seen = lambda grad: passed.add(index)  # noqa: E731
            return lambda _, __, output: output.register_hook(seen) and None if output.requires_grad else None

        handles = [layer.register_forward_hook(through(i)) for i, layer in enumerate(layers)]
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", lambda total, inputs, **k: found.append(grad(total, inputs, **k)))
            attempt(setup, policy, reference)
        for handle in handles:
            handle.remove()
        assert passed == set(range(len(layers))) and None not in found[0]
        assert len(found[0]) == (computed or len([p for p in policy.scorer.parameters() if p.requires_grad]))

    monkeypatch.setattr(dpo.memory.budget, "attempt", watched)
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, *lora, "--config", str(config))) == 0
    assert found


def test_the_trial_leaves_no_gradient_behind(tiny_policy, tmp_path, monkeypatch):
    tried = lacking_above(monkeypatch, 10**9, 10**9)
    attempt = dpo.memory.budget.attempt

    def watched(setup, policy, reference):
        attempt(setup, policy, reference)
        assert all(p.grad is None for p in policy.scorer.parameters())
        assert not policy.engine.optimizer.averaged_gradients

    monkeypatch.setattr(dpo.memory.budget, "attempt", watched)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL)) == 0
    assert tried == [1600]


def test_the_sft_stage_is_tried_too_with_its_own_rows_and_has_the_same_lines(tiny_policy, tmp_path, monkeypatch):
    flags = [*SEVERAL, "--train.sft_epochs", "1"]
    assert train_dpo.main(arguments(tmp_path / "plain", tiny_policy, *flags)) == 0
    tried = lacking_above(monkeypatch, 450, 450)
    assert train_dpo.main(arguments(tmp_path / "small", tiny_policy, *flags)) == 0
    assert tried == [1600, 800, 400] * 2
    written = json.loads((tmp_path / "small/run/sft_micro_batches.json").read_text())
    assert 0 < written["tokens"] <= 400 and written["layout"] == "chosen"
    sft = [[x["sft_loss"] for x in read_lines(tmp_path / n / "run") if "sft_loss" in x] for n in ("plain", "small")]
    assert len(sft[0]) > 0 and sft[1] == pytest.approx(sft[0], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "where"), [(["--loss.name", "tdpo"], "token_kls"), (["--loss.wpo", "true"], "logps_and_certainties")]
)
def test_the_trial_holds_the_tiles_of_losses_that_need_whole_distributions(
    flags, where, tiny_policy, tmp_path, monkeypatch
):
    """Lack of memory is played where they are made."""
    monkeypatch.setattr(dpo.memory.budget, "can_run_out", lambda device: True)
    small: list[int] = []
    original = dpo.memory.budget.attempt

    def lack(rows):
        if small[-1] > 800:
            raise torch.OutOfMemoryError("CUDA out of memory, played")

    def attempt(setup, policy, reference):
        small.append(setup.token_budget)
        with monkeypatch.context() as patch:
            own = getattr(dpo.model.forward, where)
            patch.setattr(dpo.model.forward, where, lambda *a, **k: (lack(a), own(*a, **k))[1])
            return original(setup, policy, reference)

    monkeypatch.setattr(dpo.memory.budget, "attempt", attempt)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, "--model.loss_in_forward", "true", *flags)) == 0
    assert small == [1600, 800]


def test_an_evaluation_may_take_more_tokens_than_a_step_was_tried_with(tiny_policy, tmp_path, monkeypatch):
    tried, seen, evaluate = lacking_above(monkeypatch, 10**9, 10**9), [], dpo.preference.evaluate

    def watched(policy, reference, sets, *rest):
        seen.append(max(batch.input_ids.numel() for share in sets.values() for batch in share.batches))
        return evaluate(policy, reference, sets, *rest)

    monkeypatch.setattr(dpo.preference, "evaluate", watched)
    flags = [*SEVERAL, "--train.global_batch_size", "1", "--train.max_steps", "1"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert tried == [1600] and tried.row < min(seen) <= 1600
