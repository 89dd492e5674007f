"""What a step costs beside its products: it waits for the device once, behind its last backward pass."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpo.model.attention
import dpo.model.blocks
import dpo.model.forward
import dpo.preference
import dpo.train
import dpo.training.meter
import dpo.training.policy
import dpo.training.step
import train_dpo
from dpo.data.batch import collate
from dpo.estimate import peak_tflops
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.runtime import distributed
from dpo.runtime.tracking import read_lines
from dpo.training.meter import Meter
from tests import tiny
from tests.test_stages import arguments

WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "item")
"""Operations whose result the host must know before it goes on."""


class Waits(TorchDispatchMode):
    """Notes every operation that would wait for a GPU.

    Here every tensor is on the CPU. One made there by name (`device="cpu"`), and what is computed of such ones alone,
    would be on the host beside a GPU too: nobody waits for them.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.on_host: list[torch.Tensor] = []

    def __enter__(self):
        self.make = make = torch.tensor

        def tensor(*args, **kwargs):
            made = make(*args, **kwargs)
            if kwargs.get("device") == "cpu":
                self.on_host.append(made)
            return made

        torch.tensor = tensor
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.make
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if tensors and all(any(x is known for known in self.on_host) for x in tensors):
            result = function(*args, **(kwargs or {}))
            self.on_host += [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            return result
        name = str(function.overloadpacket).removeprefix("aten.").strip("_")
        masked = name in ("index", "index_put") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if masked or any(name.startswith(wait.strip("_")) for wait in WAITS):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits():
    x = torch.arange(4.0)
    with Waits() as waits:
        float(x.sum()), bool((x > 0).all()), x[x > 1], x.nonzero(), x.unique()
        x[x > 1] = 0
    assert len(waits.found) >= 6
    with Waits() as waits:
        known = torch.tensor(2.0, device="cpu")
        bool((~known.isfinite() | (known < 0)).any()), x.mul_(1 / (known + 1))
    assert waits.found == []
    with Waits() as waits:
        bool((x * known > 0).any())
    assert len(waits.found) == 1
    with Waits() as waits:
        x[torch.tensor([0, 1])], x.sum(), x.masked_fill(x > 1, 0), x.cumsum(0)
    assert waits.found == []


def test_a_forward_pass_of_gpt2_with_a_pad_token_waits_for_nothing():
    model = tiny.model("gpt2")
    model.config.pad_token_id = model.base_model.config.pad_token_id = 3
    scorer = Scorer(model)
    use_layout(scorer, "shared", False, "sdpa")
    batch = collate(tiny.pairs(4), "shared")
    with Waits() as waits:
        scorer(batch)
    assert waits.found == []


def test_speed_counts_the_last_update_which_a_gpu_is_still_busy_with(monkeypatch):
    meter = Meter(torch.ones(11, dtype=torch.float64), pairs=10, tokens=10, seconds=1.0)
    now = [100.0]

    def late(totals):
        now[0] += 0.25
        return totals

    monkeypatch.setattr(dpo.training.meter.distributed, "sum_over_ranks", late)
    for module in (dpo.training.step, dpo.training.meter):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert meter.line(torch.device("cpu"))["perf/pairs_per_second"] == pytest.approx(10 / 1.25, rel=1e-9)
    assert meter.seconds == 0


CACHED = ["--reference.mode", "cached"]
IN_FORWARD = ["--model.loss_in_forward", "true"]
SEVERAL = ["--train.micro_batch_size", "3", "--log.samples", "0"]


def until_the_flag(monkeypatch, enter, leave):
    """Have every step call enter() first and leave() when its last backward pass is done, before the ranks' flag."""
    take_step, norm = dpo.training.step.take_step, dpo.training.step.deepspeed_engine.gradient_norm

    def watched(*args):
        def looked(engine):
            leave()  # DeepSpeed's norm puts a number on the device: a copy that CUDA counts as a wait
            return norm(engine)

        monkeypatch.setattr(dpo.training.step.deepspeed_engine, "gradient_norm", looked)
        enter()
        result = take_step(*args)
        monkeypatch.setattr(dpo.training.step.deepspeed_engine, "gradient_norm", norm)
        return result

    monkeypatch.setattr(dpo.preference, "take_step", watched)


@pytest.mark.parametrize(
    ("flags", "deepspeeds"),
    [
        ([], 0),
        ([*CACHED, *IN_FORWARD, "--train.static_shapes", "true"], 0),
        (["--train.layout", "packed", "--train.precision", "bf16"], 0),
        (["--loss.name", "ipo", "--config", "ds_configs/zero1.json"], 0),
        (["--loss.name", "ipo", "--config", "ds_configs/zero1.json", "--train.precision", "bf16"], 3),
        ([*CACHED, *IN_FORWARD, "--config", "ds_configs/zero3.json"], 0),
    ],
    ids=["online", "cached_in_forward_static", "packed_bf16", "ipo_zero1", "ipo_zero1_bf16", "cached_in_forward_zero3"],
)
def test_a_step_waits_for_the_device_once_behind_its_last_backward_pass(
    flags, deepspeeds, tiny_policy, tmp_path, monkeypatch
):
    """In the padded layout transformers itself looks at the positions once a forward pass."""
    steps: list[Waits] = []
    before: list[int] = []

    def enter():
        steps.append(Waits().__enter__())

    until_the_flag(monkeypatch, enter, lambda: before.append(len(steps[-1].found)))
    take_step = dpo.preference.take_step

    def closed(*args):
        try:
            return take_step(*args)
        finally:
            steps[-1].__exit__(None, None, None)

    monkeypatch.setattr(dpo.preference, "take_step", closed)
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, *flags)) == 0
    traced = before[0] if "ds_configs/zero3.json" in flags else 0  # DeepSpeed notes the modules' order
    assert before == [traced, 0]
    assert [len(waits.found) - count for waits, count in zip(steps, before, strict=True)] == [1 + deepspeeds] * 2


def attention_taken(monkeypatch):
    """Collects the kernel that each run has settled on: one that is refused gives way to sdpa."""
    taken, start = [], dpo.train.start_models

    def watched(*args):
        policy, reference = start(*args)
        taken.append(policy.scorer.attention)
        return policy, reference

    monkeypatch.setattr(dpo.train, "start_models", watched)
    return taken


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("reference", [[], CACHED], ids=["online", "cached"])
@pytest.mark.parametrize("head", ["false", "true"], ids=["plain", "in_forward"])
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_cuda_itself_sees_no_wait_from_the_first_forward_to_the_last_backward(
    attention, head, reference, tiny_policy, tmp_path, monkeypatch
):
    modes: list[str] = []

    def mode(name):
        modes.append(name)
        torch.cuda.set_sync_debug_mode(name)

    until_the_flag(monkeypatch, lambda: mode("error"), lambda: mode("default"))
    taken = attention_taken(monkeypatch)
    flags = ["--model.attention", attention, "--model.loss_in_forward", head, "--train.precision", "bf16", *reference]
    try:
        assert train_dpo.main(arguments(tmp_path, tiny_policy, *SEVERAL, *flags)) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes == ["error", "default"] * 2 and taken == [attention]


@pytest.mark.parametrize("loss", ["sigmoid", "tdpo"])
def test_a_deterministic_run_computes_what_another_does_and_ends_with_itself(loss, tiny_policy, tmp_path, monkeypatch):
    """On a CPU, where no kernel lacks such a version; `torch` refuses some on a GPU."""
    enabled, step = [], dpo.preference.take_step

    def looked(*args):
        enabled.append(torch.are_deterministic_algorithms_enabled())
        return step(*args)

    monkeypatch.setattr(dpo.preference, "take_step", looked)
    lines = []
    for flags in (["--train.deterministic", "true"], []):
        folder = tmp_path / str(len(flags))
        assert train_dpo.main(arguments(folder, tiny_policy, *SEVERAL, "--loss.name", loss, *flags)) == 0
        lines.append([line["loss"] for line in read_lines(folder / "run") if "loss" in line])
    assert enabled == [True, True, False, False] and len(lines[0]) == 2 and lines[0] == lines[1]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_deterministic_run_on_a_gpu_ends_in_the_same_bits_each_time(attention, tiny_policy, tmp_path, monkeypatch):
    flags = ["--train.deterministic", "true", "--model.attention", attention, "--train.precision", "bf16"]
    weights, taken = [], attention_taken(monkeypatch)
    for name in ("once", "twice"):
        assert train_dpo.main(arguments(tmp_path / name, tiny_policy, *SEVERAL, *flags)) == 0
        weights.append((tmp_path / name / "run/final/model.safetensors").read_bytes())
    assert weights[0] == weights[1] and taken == [attention] * 2


@pytest.mark.parametrize(("loss", "used"), [("sigmoid", True), ("aot", True), ("tdpo", False)])
def test_the_gradient_is_taken_in_forward_where_the_loss_allows_and_changes_no_line(
    loss, used, tiny_policy, tmp_path, monkeypatch
):
    calls = []
    original = dpo.model.forward.total_loss
    monkeypatch.setattr(
        dpo.model.forward, "total_loss", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    lines = []
    for wanted in ("false", "true"):
        folder = tmp_path / wanted
        flags = ["--model.loss_in_forward", wanted, "--loss.name", loss, "--optim.lr", "1e-3", "--log.samples", "0"]
        assert train_dpo.main(arguments(folder, tiny_policy, "--train.micro_batch_size", "3", *flags)) == 0
        lines.append([line for line in read_lines(folder / "run") if "loss" in line])
        assert bool(calls) == (wanted == "true" and used)
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def lines_of(folder, policy, *flags):
    """What a run of two steps wrote."""
    more = ["--optim.lr", "1e-3", "--log.samples", "0", *flags]
    assert train_dpo.main(arguments(folder, policy, *more)) == 0
    return [line for line in read_lines(folder / "run") if "loss" in line]


def assert_equal_lines(found, truth):
    assert len(found) == len(truth) == 2 and truth[1]["loss"] != pytest.approx(truth[0]["loss"], abs=1e-4)
    for a, b in zip(found, truth, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=5e-6), name


def test_a_pair_longer_than_a_tile_is_scored_after_forward_and_changes_no_line(tiny_policy, tmp_path, monkeypatch):
    truth, chunks = lines_of(tmp_path / "whole", tiny_policy), []
    longest = 100  # of 40 to 170 completion tokens a pair

    class Small(dpo.model.forward.Scorer):
        def __init__(self, model, **more):
            super().__init__(model, longest, **more)

        def chunks(self, batch):
            chunks.append(super().chunks(batch))
            return chunks[-1]

    monkeypatch.setattr(dpo.training.policy, "Scorer", Small)
    flags = ["--model.loss_in_forward", "true", "--train.micro_batch_size", "1"]
    assert_equal_lines(lines_of(tmp_path / "small", tiny_policy, *flags), truth)
    assert None in chunks and any(chunks)


@pytest.mark.parametrize("twin", ["varlen_eager", "flex_eager"])
def test_a_run_has_the_same_lines_whichever_kernel_attends(twin, tiny_policy, tmp_path, monkeypatch):
    truth = lines_of(tmp_path / "sdpa", tiny_policy)
    monkeypatch.setattr(dpo.model.attention, "candidates", lambda wanted, device: [twin])
    assert_equal_lines(lines_of(tmp_path / "twin", tiny_policy), truth)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
def test_a_compiled_run_compiles_nothing_after_its_first_step(tiny_policy, tmp_path, monkeypatch):
    """Evaluations and samples in between; traced and run eagerly."""
    torch._dynamo.reset()
    counters.clear()
    # Not that of DeepSpeed, which replaces it for the whole process once ZeRO-3 has run in it.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    compile_blocks, step, made = dpo.model.blocks.compile_blocks, dpo.preference.take_step, []
    monkeypatch.setattr(dpo.model.blocks, "compile_blocks", lambda model: compile_blocks(model, "eager"))

    def counted(*args):
        result = step(*args)
        made.append(counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(dpo.preference, "take_step", counted)
    flags = ["--model.compile", "true", "--train.eval_every", "1", "--log.samples", "2", "--log.sample_every", "1",
             "--train.epochs", "2", "--train.max_steps", "4"]  # fmt: skip
    found = lines_of(tmp_path / "compiled", tiny_policy, *flags)
    assert len(made) == 4 and made[0] > 0
    assert made == made[:1] * 4 and not counters["recompiles"]
    torch._dynamo.reset()
    assert_equal_lines(found[:2], lines_of(tmp_path / "plain", tiny_policy, *flags[2:])[:2])


def test_metrics_are_reduced_once_a_log_line(tiny_policy, tmp_path, monkeypatch):
    reduce, calls = distributed.sum_over_ranks, []
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda *a: calls.append(1) or reduce(*a))
    flags = ["--train.global_batch_size", "2", "--train.max_steps", "8", "--log.every", "4", "--log.samples", "0"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    lines = read_lines(tmp_path / "run")
    assert (sum("loss" in line for line in lines), sum("eval_loss" in line for line in lines)) == (2, 2)
    assert len(calls) == 2 + 2 + 1  # lines, evaluations, the look at the start


@pytest.mark.parametrize("config", ["ds_configs/zero2.json", "ds_configs/zero3.json"])
def test_deepspeed_does_not_wait_for_the_device_to_time_its_own_steps(config, tiny_policy, tmp_path, monkeypatch):
    """Unless told otherwise it does so twice a step, from the third on."""
    accelerator, waits = get_accelerator(), []
    monkeypatch.setattr(accelerator, "synchronize", lambda *_: waits.append(1))
    flags = ["--config", config, "--train.global_batch_size", "2", "--train.max_steps", "5", "--log.samples", "0"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    assert waits == []


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA A100-SXM4-80GB", "fp16", 312), ("Tesla T4", "fp16", 65),
        ("NVIDIA L40S", "bf16", 362), ("NVIDIA H100 PCIe", "bf16", None), ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None), ("", "bf16", None),
    ],
)  # fmt: skip
def test_the_peak_is_told_by_the_devices_name_or_not_at_all(name, precision, peak):
    assert peak_tflops(name, precision) == peak


@pytest.mark.parametrize(("more", "of_weight"), [([], 6), (["--model.lora.r", "2"], 4)], ids=["whole", "lora"])
def test_mfu_is_the_operations_of_the_formula_over_time_and_the_peak_beside_it(
    more, of_weight, tiny_policy, tmp_path, monkeypatch
):
    flags = ["--log.samples", "0", "--log.every", "2", *more]
    assert train_dpo.main(arguments(tmp_path / "unknown", tiny_policy, *flags)) == 0
    assert not [k for line in read_lines(tmp_path / "unknown/run") for k in line if "mfu" in k or "peak_tflops" in k]
    lengths = []
    monkeypatch.setattr(dpo.training.meter, "peak_tflops", lambda name, precision: 2.0)
    original = dpo.training.meter.useful_flops
    seen = lambda x, **sizes: lengths.append((x, sizes)) or original(x, **sizes)  # noqa: E731
    monkeypatch.setattr(dpo.training.meter, "useful_flops", seen)
    assert train_dpo.main(arguments(tmp_path / "known", tiny_policy, *flags)) == 0
    (line,) = [line for line in read_lines(tmp_path / "known/run") if "loss" in line]
    assert line["perf/peak_tflops"] == 2.0
    total = 0.0
    for pairs, sizes in lengths:
        for p, c, r in pairs.tolist():
            products = sum(range(1, p + c + 1)) + sum(range(p + 1, p + r + 1))
            total += of_weight * (sizes["body"] * (p + c + r) + sizes["head"] * (c + r))
            total += 12 * sizes["attention_width"] * products
    seconds = 16 / line["perf/pairs_per_second"]
    assert line["perf/mfu"] == pytest.approx(total / seconds / 2e12, rel=1e-9)


def test_waiting_for_batches_counts_as_time_of_training(tiny_policy, tmp_path, monkeypatch):
    step, seconds = dpo.preference.take_step, []

    def late(setup, policy, reference, loss, work, *rest):
        seconds.append(work.waited)
        return step(setup, policy, reference, loss, replace(work, waited=1000.0), *rest)

    monkeypatch.setattr(dpo.preference, "take_step", late)
    flags = ["--log.samples", "0", "--train.max_steps", "1"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
    (line,) = [line for line in read_lines(tmp_path / "run") if "loss" in line]
    assert 1000 < 8 / line["perf/pairs_per_second"] < 1100 and seconds[0] < 100


def test_mixtures_of_experts_have_no_mfu(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo.training.meter, "peak_tflops", lambda name, precision: 2.0)
    of = dpo.training.meter.shape_of
    monkeypatch.setattr(dpo.training.meter, "shape_of", lambda *a, **k: replace(of(*a, **k), has_fused_experts=True))
    assert train_dpo.main(arguments(tmp_path, tiny_policy, "--log.samples", "0", "--train.max_steps", "1")) == 0
    assert not [k for line in read_lines(tmp_path / "run") for k in line if "mfu" in k or "peak_tflops" in k]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_stops_the_run_though_every_loss_is(
    stage, precision, tiny_policy, tmp_path, monkeypatch, capsys
):
    losses_of, calls = dpo.training.step.losses_of, []

    def poisoned(*args):
        total, output, logps = losses_of(*args)
        calls.append(1)
        # The square root of 0 times anything adds nothing to the loss, and 0 times infinity to its gradient.
        return total + ((total * 0).sqrt() if len(calls) == 2 else 0), output, logps

    monkeypatch.setattr(dpo.training.step, "losses_of", poisoned)
    flags = ["--config", f"ds_configs/{stage}.json", "--train.precision", precision, "--log.samples", "0"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train_dpo.py: step 2: the gradient is not finite though every loss is, over rows ")
    lines = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1]
    assert len((tmp_path / "run/nonfinite.jsonl").read_text().splitlines()) == 8


def test_a_run_that_is_told_not_to_compute_the_norm_of_its_gradient_still_steps(tiny_policy, tmp_path):
    config = tmp_path / "no_norm.json"
    config.write_text('{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}')
    flags = ["--config", str(config), "--optim.max_grad_norm", "0", "--log.samples", "0"]
    assert train_dpo.main(arguments(tmp_path, tiny_policy, *flags)) == 0
