"""What a run would do and need, told without doing it; memory against what real engines allocate."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import train_dpo
from dpo.__main__ import main
from dpo.config import LossConfig
from dpo.data.epochs import Epochs
from dpo.data.loader import Loader
from dpo.data.planner import Costs, Layout, attention_products, plan_batch
from dpo.estimate import (
    GIB,
    GPUS,
    OFFLOADED_BYTES,
    Hardware,
    checkpoint_bytes,
    computed_flops,
    costs_of,
    memory,
    reduction_buckets,
    traffic,
    useful_flops,
)
from dpo.memory.room import Room
from dpo.model import blocks
from dpo.model.shape import _kept_bytes, shape_of
from dpo.planning.forecast import batch_parts
from dpo.run.setup import Setup
from dpo.types import PackedBatch
from tests import tiny
from tests.data.tiny_tokenizers import plain_rows, written
from tests.ranks import ROOT, run

JOBS = ["2-bf16", "2-fp32", "1-fp32", "1-bf16", "3-bf16", "0-fp32"]
OFFLOADED = ["2-bf16-offload", "3-bf16-offload"]


# --- memory ----------------------------------------------------------------------------------------------------------


def parts(stage: int, **changes: int | bool) -> list[float]:
    """GiB of weights, gradients, optimizer, reference for 2^30 parameters on 4 ranks: the bytes of one parameter."""
    kwargs = dict(stage=stage, world_size=4, half=True, reference_bytes=2) | changes
    return list(memory(GIB, **kwargs).values())  # type: ignore[arg-type]


def test_each_stage_shares_one_part_more_among_the_ranks() -> None:
    assert parts(0) == [2, 6, 12, 2]
    assert parts(1) == [2, 6, 3, 2]
    assert parts(2) == [2, 1, 3, 2]
    assert parts(3) == [0.5, 1, 3, 0.5]


def test_fp32_has_a_master_copy_too() -> None:
    assert parts(1, half=False, reference_bytes=4) == [4, 4, 3, 4]
    assert parts(2, half=False, reference_bytes=4) == [4, 1, 3, 4]
    assert parts(3, half=False, reference_bytes=0, world_size=1) == [4, 4, 12, 0]


def test_without_zero_fp32_weights_are_their_own_master_copy() -> None:
    assert parts(0, half=False, reference_bytes=4) == [4, 4, 8, 4]


def test_of_a_mixture_the_active_experts_compute_and_all_take_memory() -> None:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_experts_per_tok=2)
    configs = [transformers.MixtralConfig(**sizes, num_local_experts=experts) for experts in (2, 8)]
    few, many = (shape_of(config, torch.float32) for config in configs)
    expert = 3 * 32 * 48
    assert many.parameters - few.parameters >= 2 * 6 * expert  # two layers; and the router's rows
    assert many.body - few.body == 2 * 6 * 32 and few.has_fused_experts  # the router's rows alone


def test_seven_billion_parameters_on_eight_gpus_take_what_is_known() -> None:
    found = memory(7_000_000_000, stage=2, world_size=8, half=True, reference_bytes=2)
    assert sum(found.values()) == pytest.approx(7e9 * (2 + 4 / 8 + 12 / 8 + 2) / 2**30)
    assert list(found) == ["weights", "gradients", "optimizer (AdamW, fp32 master)", "reference"]


@pytest.fixture(scope="module")
def allocated(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict[str, int]]]:
    """(job, ranks) -> what tests/engine_memory.py measured on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for ranks in (1, 2):  # in processes of their own: other tests leave tensors in this one
        out = folder / str(ranks)
        out.mkdir()
        done = run(["tests/engine_memory.py", str(out), *JOBS, *OFFLOADED], ranks)
        assert not any(done.codes), done.output[-4000:]
        for job in (*JOBS, *OFFLOADED):
            found[job, ranks] = [json.loads((out / f"{job}.{rank}.json").read_text()) for rank in range(ranks)]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("job", JOBS)
def test_memory_is_what_a_real_engine_allocates(allocated: Any, job: str, ranks: int) -> None:
    stage, precision = job.split("-")
    half = precision == "bf16"
    for rank in allocated[job, ranks]:
        planned = memory(
            rank["parameters"], stage=int(stage), world_size=ranks, half=half, reference_bytes=2 if half else 4
        )
        weights, gradients, optimizer, reference = (size * GIB for size in planned.values())
        assert rank["weights"] == weights and rank["reference"] == reference
        # A reduction bucket of 4,000 bytes and scalars; the smallest mistake, one byte a parameter, is 143,520 bytes.
        assert rank["gradients and optimizer"] == pytest.approx(gradients + optimizer, abs=10_000)
        if job not in ("1-bf16", "3-bf16"):  # these engines keep their fp32 gradients from step to step
            assert rank["optimizer"] == pytest.approx(optimizer, abs=10_000)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("job", OFFLOADED)
def test_an_offloaded_optimizer_takes_the_main_memory_that_is_planned(allocated: Any, job: str, ranks: int) -> None:
    """On a CPU all tensors are in main memory: beside it ZeRO-2 holds buffers for its largest gradient, of 64,000."""
    for rank in allocated[job, ranks]:
        planned = OFFLOADED_BYTES * rank["parameters"] / ranks
        assert 0.98 * planned < rank["optimizer"] < 1.02 * planned + (2 * 64_000 if job[0] == "2" else 0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("job", JOBS)
def test_a_checkpoint_takes_the_disk_that_was_planned(allocated: Any, job: str, ranks: int) -> None:
    stage, precision = job.split("-")
    measured = allocated[job, ranks][0]
    planned = checkpoint_bytes(measured["parameters"], stage=int(stage), half=precision == "bf16")
    names_and_pickles = {"0": 22_000, "3": 14_000}.get(stage, 12_000) * ranks + 8_000
    assert planned <= measured["checkpoint"] <= planned + names_and_pickles


# --- the model without its weights -----------------------------------------------------------------------------------


def llama_8b() -> transformers.LlamaConfig:
    """Sizes of Llama-3-8B."""
    return transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip


def test_parameters_are_counted_without_weights_tied_ones_once() -> None:
    gpt2 = shape_of(transformers.GPT2Config(), torch.bfloat16)
    assert (gpt2.parameters, gpt2.body) == (124_439_808, 12 * 12 * 768**2)
    assert (gpt2.vocabulary, gpt2.hidden, gpt2.attention_width) == (50257, 768, 12 * 768)
    large = shape_of(llama_8b(), torch.bfloat16)
    assert (large.parameters, large.body) == (8_030_261_248, 6_979_321_856)
    assert large.block_input == 32 * 4096 * 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_activations_counted_on_meta_are_those_that_a_real_pass_keeps(family: str) -> None:
    real = tiny.model(family, torch.float32)
    blocks.fuse_gelu(real)
    real.set_attn_implementation("sdpa")
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    def size(tokens: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = real.base_model(
                input_ids=torch.zeros(1, tokens, dtype=torch.int64), position_ids=torch.arange(tokens)[None],
                use_cache=False,
            )  # fmt: skip
        del output
        return sum(storage.nbytes() for storage in kept.values())

    measured = (size(128) - size(64)) / 64
    assert shape_of(real.config, torch.float32).activations == measured


def test_an_architecture_that_does_not_run_on_meta_only_loses_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(transformers.GPT2Model, "forward", broken)
    shape = shape_of(tiny.model("gpt2", torch.float32).config, torch.float32)
    assert shape.activations is None and shape.parameters > 0


def test_nothing_is_allocated_for_a_large_model() -> None:
    assert not any(p.device.type != "meta" for p in _meta_parameters())


def _meta_parameters() -> list[torch.nn.Parameter]:
    seen: list[torch.nn.Parameter] = []
    from dpo.model import shape

    original = shape._kept_bytes

    def watched(model: Any, num_tokens: int) -> int:
        seen.extend(model.parameters())
        return original(model, num_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "_kept_bytes", watched)
        shape.shape_of(llama_8b(), torch.bfloat16)
    assert seen and _kept_bytes is original
    return seen


# --- operations and traffic ------------------------------------------------------------------------------------------

HH = np.array([[153, 73, 70]])
"""Mean prompt, chosen and rejected of HH-RLHF in GPT-2's tokens, at most 1,024."""
GPT2 = {"body": 84_934_656, "head": 768 * 50257, "attention_width": 12 * 768}


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_attention_products_are_the_true_entries_of_the_mask(layout: str) -> None:
    p, c, r = 3, 4, 2
    if layout == "shared":
        seen = np.tril(np.ones((p + c + r, p + c + r)))
        seen[p + c :, p : p + c] = 0
        count = seen.sum()
    else:
        count = np.tril(np.ones((p + c, p + c))).sum() + np.tril(np.ones((p + r, p + r))).sum()
    assert attention_products(np.array([[p, c, r]]), layout).tolist() == [count]  # type: ignore[arg-type]


def test_useful_operations_follow_the_formula_term_by_term() -> None:
    lengths = np.array([[3, 4, 2], [1, 1, 1]])
    assert useful_flops(lengths, body=1, head=0, attention_width=0) == 6 * 12
    assert useful_flops(lengths, body=0, head=1, attention_width=0) == 6 * 8
    products = int(attention_products(lengths, "shared").sum())
    assert useful_flops(lengths, body=0, head=0, attention_width=1) == 12 * products
    frozen = useful_flops(lengths, body=1, head=1, attention_width=1, frozen=True)
    assert frozen == 4 * 12 + 4 * 8 + 12 * products


def test_a_pair_of_hh_costs_gpt2_what_is_known() -> None:
    def computed(**how: bool) -> float:
        return computed_flops(HH, "shared", tokens=296, **GPT2, **how)  # type: ignore[arg-type]

    assert useful_flops(HH, **GPT2) == pytest.approx(190e9, rel=0.02)
    assert computed(recompute=False, reference=False) == pytest.approx(useful_flops(HH, **GPT2))
    assert computed(recompute=False, reference=True) == pytest.approx(254e9, rel=0.02)
    assert computed(recompute=True, reference=False) == pytest.approx(243e9, rel=0.02)
    assert computed(recompute=False, reference=False, look_ahead=True) == computed(recompute=False, reference=True)


def sent(stage: int, world_size: int = 8, **changes: float) -> dict[str, float]:
    """GB sent for 8e9 parameters in 16 bits."""
    kwargs = dict(micro_steps=1, width=2, reference_width=2) | changes
    found = traffic(8 * 10**9, stage=stage, world_size=world_size, **kwargs)  # type: ignore[arg-type]
    return {name: count / 1e9 for name, count in found.items()}


def test_stage_2_reduces_after_every_micro_batch_and_stage_1_once() -> None:
    assert sent(2) == {"gradients reduced": 28, "weights gathered": 14}
    assert sent(2, micro_steps=3) == {"gradients reduced": 84, "weights gathered": 14}
    assert sent(1, micro_steps=3) == {"gradients reduced": 28, "weights gathered": 14}
    assert sent(0) == {"gradients reduced": 28, "weights gathered": 0}
    assert sent(2, micro_steps=3, to_owner=True) == {"gradients reduced": 42, "weights gathered": 14}
    assert sent(1, micro_steps=3, to_owner=True) == sent(1)  # under 16 bits DeepSpeed has no such choice there


def test_stage_3_gathers_weights_twice_a_micro_batch_and_the_reference_once() -> None:
    twice = {"weights gathered": 56, "gradients scattered": 28, "reference gathered": 28}
    assert sent(3, micro_steps=2) == twice
    assert sent(3, micro_steps=2, reference_width=0) == twice | {"reference gathered": 0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_sends_nothing(stage: int) -> None:
    assert sum(sent(stage, world_size=1).values()) == 0


# --- the schedule ----------------------------------------------------------------------------------------------------


COSTS = Costs(completion=450_000, product=1000)


@pytest.mark.parametrize(("layout", "row_tokens"), [("shared", None), ("packed", None), ("padded", None),
                                                    ("shared", 160)])  # fmt: skip
def test_the_forecast_is_the_schedule_that_the_ranks_follow(layout: Layout, row_tokens: int | None) -> None:
    from dpo.planning.spread import schedule_of

    pairs, epochs, ranks = tiny.Pairs(tiny.pairs(30, longest=30, all_scored=True)), Epochs(30, 12, seed=1), 2

    class FakeSetup:
        config: Any = type("C", (), {"train": type("T", (), {"layout": layout}), "loss": LossConfig()})
        train_pairs = pairs
        world = type("W", (), {"world_size": ranks})

        def loader(self, pairs: Any, layout: Any, rank: int = 0) -> Loader:
            return Loader(pairs, epochs, rank, ranks, layout, 150, row_tokens=row_tokens, costs=COSTS)

    setup: Any = FakeSetup()
    setup.epochs = epochs
    shape = shape_of(tiny.model("gpt2", torch.float32).config, torch.float32)
    found = schedule_of(setup, shape, recompute=False, reference=True)
    batches = [
        [setup.loader(pairs, layout, rank)[step].batches for rank in range(ranks)]
        for step in range(epochs.steps_per_epoch)
    ]
    every = [b for step in batches for rank in step for b in rank if b.pair_ids or row_tokens]
    assert (found.steps, found.looked_at) == (3, 3)
    assert found.micro_steps.tolist() == [len(step[0]) for step in batches[:2]]  # the third has fewer pairs
    assert found.largest == max(b.input_ids.numel() for b in every)
    assert found.largest_completions == max(b.target_ids.numel() for b in every)
    padding = sum(b.num_padding_tokens for b in every) / sum(b.input_ids.numel() for b in every)
    assert found.padding == pytest.approx(padding)
    assert (found.padding > 0.05) == (layout == "padded" or row_tokens is not None)

    def cost(batch: PackedBatch) -> float:
        products = attention_products(pairs.lengths[list(batch.pair_ids)], layout).sum()
        return batch.input_ids.numel() + 0.45 * batch.target_ids.numel() + 0.001 * products

    loads = [[sum(cost(b) for b in rank if b.pair_ids or row_tokens) for rank in step] for step in batches]
    assert found.imbalances.tolist() == pytest.approx([max(x) / np.mean(x) for x in loads[:2]])
    assert found.last == pytest.approx(max(loads[2]) / np.mean(loads[2]))
    assert (found.waits >= found.imbalances).all()


def test_large_steps_and_large_data_sets_are_planned_in_seconds() -> None:
    lengths = np.random.default_rng(0).geometric(0.01, (160_000, 3)).clip(1, 512)
    started = time.perf_counter()
    step = plan_batch(range(4096), lengths, world_size=1024, token_budget=16384, layout="shared")
    assert len(step) == 1024 and time.perf_counter() - started < 1  # 0.01 s where this was written
    started = time.perf_counter()
    whole = plan_batch(range(160_000), lengths, world_size=1, token_budget=4096, layout="shared")
    assert len(whole[0]) > 10_000 and time.perf_counter() - started < 8  # 0.5 s; first fit, quadratic: about 110


# --- what is printed -------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Without the table's lines."""
    return re.sub(r"\s+", " ", re.sub("[^ -~]", " ", text))


@pytest.mark.parametrize("flag", ["--dry_run", "--prepare_only"])
def test_the_plan_is_printed_and_nothing_is_written(
    flag: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, plain_rows(10))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    argv = ["--model.policy", str(tiny_policy), "--data.train", str(data), "--train.global_batch_size", "4"]
    argv += ["--train.epochs", "3", "--data.cache_dir", str(tmp_path / "cache"), flag]
    before = {file: file.stat().st_mtime_ns for file in tiny_policy.iterdir()}
    assert train_dpo.main(argv) == 0
    shown = plain(capsys.readouterr().out)
    assert "pairs: training / validation 10 / 0" in shown
    assert "optimizer steps 9 (3 an epoch)" in shown and "ranks x pairs a step 1 x 4" in shown
    if flag == "--dry_run":
        assert re.search(r"costliest micro-batch \d+ tokens, [\d.]+ s forward and backward", shown)
        assert re.search(r"memory per GPU: sum without activations 0\.00[1-9] GiB", shown)
    else:
        assert f"export HF_HUB_OFFLINE=1 DPO_CACHE={tmp_path / 'cache'}" in shown
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "train.jsonl"]
    assert before == {file: file.stat().st_mtime_ns for file in tiny_policy.iterdir()}


def test_a_thousand_ranks_are_planned_without_weights_gpu_or_process_group(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a plan needs neither ranks nor a GPU")

    for module, name in ((torch.distributed, "init_process_group"), (torch.cuda, "_lazy_init")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setenv("COLUMNS", "150")
    folder = tmp_path / "no_weights"
    folder.mkdir()
    for file in tiny_policy.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    assert len(list(folder.iterdir())) == len(list(tiny_policy.iterdir())) - 1
    argv = ["plan", "--config", str(ROOT / "ds_configs/zero3.json"), "--model.policy", str(folder)]
    argv += ["--data.train", "builtin:world", "--data.cache_dir", str(tmp_path / "cache"), "--data.max_length", "128"]
    argv += ["--ranks", "1024", "--train.global_batch_size", "2048", "--gpu", "t4", "--disk_gb", "0.001"]
    argv += ["--train.sft_epochs", "2", "--data.validation_limit", "4"]
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 0
    shown = plain(capsys.readouterr().out)
    assert "ranks x pairs a step 1024 x 2048" in shown and "precision fp16" in shown and "ZeRO stage 3" in shown
    assert "SFT steps before 4 optimizer steps 2 (2 an epoch)" in shown
    assert "looked at all 2 steps of the first epoch" in shown
    assert "Memory of each GPU, 1,024 x t4" in shown and "GiB of t4: fits" in shown
    for part in ("weights", "gradients", "optimizer (AdamW, fp32 master)", "reference", "activations, kept",
                 "gradient of the head"):  # fmt: skip
        assert re.search(rf"{re.escape(part)} (\(not in use\) )?[\d.]+ [KMG]iB", shown), part
    assert re.search(r"logits tile, [\d,]+ rows in fp32 and a copy in 16 bits [\d.]+ [KM]iB", shown)
    assert "12 bytes a parameter" in shown and "(8 ranks)" in shown and "between nodes" in shown
    assert re.search(r"time to write one \d\S* s at 0.001 GB/s", shown)
    assert "a step, estimate" in shown and "sent a step and rank: reference gathered" in shown
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "no_weights"]


def test_a_plan_spreads_by_the_models_costs_in_micro_batches_that_the_gpu_can_hold(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo import plan
    from dpo.planning import spread

    setups: list[Setup] = []
    monkeypatch.setattr(
        "dpo.planning.forecast.schedule_of",
        lambda setup, *a, **k: setups.append(setup) or spread.schedule_of(setup, *a, **k),
    )
    monkeypatch.setattr(plan, "show_table", lambda *_: None)
    argv = ["plan", "--config", str(ROOT / "ds_configs/zero2.json"), "--model.policy", str(tiny_policy)]
    argv += ["--data.train", "builtin:world", "--data.cache_dir", str(tmp_path), "--ranks", "2", "--data.train_limit",
             "64", "--data.max_length", "128"]  # fmt: skip
    for gpu in ("t4", "b200"):
        assert main([*argv, "--gpu", gpu]) == 0
    assert main([*argv, "--train.tokens_per_micro_batch", "300"]) == 0
    shape = shape_of(transformers.AutoConfig.from_pretrained(tiny_policy), torch.float16)
    head = shape.hidden * shape.vocabulary
    expected = costs_of(body=shape.body, head=head, attention_width=shape.attention_width)
    assert expected.completion > 0 < expected.product
    for setup in setups:
        assert setup.costs == setup.loader(setup.train_pairs, "shared").costs == expected
    budgets = [setup.token_budget for setup in setups]
    assert budgets == [65536, 65536, None] and setups[2].loader(setups[2].train_pairs, "shared").token_budget == 300
    bucket = json.loads((ROOT / "ds_configs/zero2.json").read_text())["zero_optimization"]["reduce_bucket_size"]
    monkeypatch.setitem(GPUS, "t4", replace(GPUS["t4"], memory_gib=0.04 + 4 * bucket / GIB))
    assert main([*argv, "--gpu", "t4"]) == 0
    assert setups[3].token_budget is not None and 1000 < setups[3].token_budget < 65536


@pytest.mark.parametrize(("stage", "gradients"), [(1, 4), (2, 4 / 8)])
def test_a_plan_has_the_room_that_a_run_has(
    stage: int, gradients: float, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left beside weights, reference, states, gradients in fp32, buckets and under ZeRO-2 a gradient in one."""
    rooms: list[Room] = []
    monkeypatch.setattr("dpo.planning.forecast.Room", lambda *parts: rooms.append(Room(*parts)) or rooms[-1])
    file = ROOT / f"ds_configs/zero{stage}.json"
    argv = ["plan", "--config", str(file), "--model.policy", str(tiny_policy), "--data.train", "builtin:world"]
    argv += ["--data.cache_dir", str(tmp_path), "--ranks", "8", "--gpu", "a100", "--data.train_limit", "64"]
    assert main(argv) == 0
    zero = json.loads(file.read_text())["zero_optimization"]
    taken = rooms[0].trained * (2 + 2 + gradients + 12 / 8) + reduction_buckets(zero, 2)
    taken += 2 * 2 * rooms[0].shape.largest if stage == 2 else 0
    assert rooms[0].free == pytest.approx(GPUS["a100"].memory_gib * GIB - taken, abs=100)


@pytest.mark.parametrize(("gpu", "unused"), [("a100", "recomputed"), ("a100_40gb", "kept")])
def test_a_plan_keeps_activations_of_a_large_model_where_a_gpu_has_room_for_them(
    gpu: str, unused: str, tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_8b().save_pretrained(tmp_path / "large")
    transformers.AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(tmp_path / "large")
    argv = ["plan", "--config", str(ROOT / "ds_configs/zero2.json"), "--model.policy", str(tmp_path / "large")]
    argv += ["--data.train", "builtin:world", "--data.cache_dir", str(tmp_path), "--ranks", "8", "--gpu", gpu]
    argv += ["--data.train_limit", "64", "--data.validation_limit", "8", "--train.epochs", "9"]
    assert main(argv) == 0
    shown = plain(capsys.readouterr().out)
    assert f"activations, {unused} (not in use)" in shown and ": 2 kept, the best, and one written" in shown
    sizes = re.search(r"one checkpoint ([\d.]+) GiB.*disk for checkpoints ([\d.]+) GiB", shown)
    # The two newest, the best, and one that is being written.
    assert sizes and float(sizes[2]) == pytest.approx(4 * float(sizes[1]), rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--ranks", "0"], "plan: ranks is 0; use a whole number of at least 1"),
        (["plan", "--ranks", "many"], "plan: ranks is many; use a whole number"),
        (["plan", "--gpu", "h1000"], "plan: gpu is h1000; use t4, v100, l4"),
        (["plan", "--peak_share", "40"], "plan: peak_share is 40.0; use a number above 0, at most 1"),
        (["plan", "--disk_gb", "0"], "plan: disk_gb is 0.0; use a number above 0"),
        (["plan", "--rank", "8"], "plan: unknown key rank; did you mean ranks?"),
        (["plan", "--dry_run"], "plan: unknown key dry_run"),
        (["plan", "--ranks", "128"], "plan: train.global_batch_size is 64 pairs for 128 ranks"),
        (["plan", "--config", "none.json"], "plan: --config none.json: no such file"),
        (["plann"], ": unknown verb plann; did you mean plan?"),
        (["fly"], ": unknown verb fly; use audit, plan"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("python -m dpo") and message in err and err.count("\n") == 1


def test_help_names_the_verbs_and_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "plan" in capsys.readouterr().out
    assert main([]) == 2 and "usage" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "usage: python -m dpo plan" in shown
    for flag in ("--ranks", "--gpu", "--config", "--recipe", "--train.global_batch_size"):
        assert flag in shown
    assert all(name in str(Hardware.__doc__) or name in plain(shown) for name in GPUS)


def test_the_last_mlp_keeps_every_row_of_a_padded_layout_and_of_others_those_that_predict():
    """tests/pretended/ compares the plan of a shared row with what is allocated."""
    shape = shape_of(tiny.model("llama").config, torch.bfloat16)
    sizes: Any = SimpleNamespace(largest=1000, largest_prompts=600, largest_completions=400)
    assert shape.last_mlp > 0
    layouts: tuple[Layout, ...] = ("packed", "padded")
    packed, padded = (batch_parts(shape, sizes, of, 2, True, True)["activations, kept"] for of in layouts)
    assert packed and padded and (padded - packed) * GIB == pytest.approx(600 * shape.last_mlp)
