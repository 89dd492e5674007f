"""16-bit products by way of fp32: where they are chosen, and what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from dpo.config import OptimConfig
from dpo.data.batch import index_segments
from dpo.model import products
from dpo.model.attention_sdpa import attend
from dpo.model.head import token_logps
from dpo.runtime import distributed, engine, weights
from dpo.types import Segment
from tests import tiny

SEGMENTS = index_segments((Segment(0, 20), Segment(20, 29, 0, 11), Segment(29, 40)))
X86 = {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False, "cpu_name": "Intel Xeon"}


@pytest.fixture
def slow(monkeypatch):
    """As on a CPU that multiplies fp32 faster."""
    monkeypatch.setattr(products, "fp32_is_faster", lambda: True)


@pytest.mark.parametrize(("features", "wide"), [
    (X86, True),
    (X86 | {"avx512_bf16": True}, True),
    (X86 | {"avx512_bf16": True, "amx_bf16": True}, False),
    (X86 | {"cpu_name": "AMD EPYC"}, True),
    (X86 | {"cpu_name": "AMD EPYC", "avx512_bf16": True}, False),
    ({"architecture": "x86_64", "cpu_name": "Intel Xeon"}, False),
    ({"architecture": "aarch64"}, False),
    ({}, False),
], ids=["AVX2", "Intel's AVX512-BF16", "AMX", "AMD, AVX2", "AMD's AVX512-BF16", "old", "Arm", "unknown"])  # fmt: skip
def test_fp32_is_chosen_by_what_the_cpu_can_do(monkeypatch, features, wide):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert products.fp32_is_faster.__wrapped__() is wide


def test_fp32_is_not_chosen_by_a_torch_that_does_not_know_the_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not products.fp32_is_faster.__wrapped__()


def layers(dtype):
    torch.manual_seed(0)
    linear, other, conv = torch.nn.Linear(24, 40), torch.nn.Linear(24, 40, bias=False), Conv1D(40, 24)
    torch.nn.init.normal_(conv.bias)
    return torch.nn.ModuleList([linear, other, conv]).to(dtype)


def outcome(layer, x):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", range(3), ids=["linear", "without bias", "GPT-2's"])
def test_a_widened_layer_rounds_the_products_of_fp32_once(slow, dtype, which):
    layer, x = layers(dtype)[which], torch.randn(2, 12, 24, dtype=dtype)
    exact = copy.deepcopy(layer).float()
    products.widen(torch.nn.ModuleList([layer]))
    y = layer(x)
    torch.testing.assert_close(y, exact(x.float()).to(dtype), rtol=0, atol=0)
    grad = torch.randn_like(y)
    wide = x.float().requires_grad_()
    expected = torch.autograd.grad(exact(wide), [wide, *exact.parameters()], grad.float())
    narrow = x.clone().requires_grad_()
    found = torch.autograd.grad(layer(narrow), [narrow, *layer.parameters()], grad)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)


def test_few_rows_are_multiplied_without_a_copy_of_the_weight(slow, monkeypatch):
    model = layers(torch.bfloat16)
    products.widen(model)
    seen = []
    monkeypatch.setattr(products._Product, "apply", lambda x, *rest: seen.append(len(x)) or x)
    for layer in model:
        for rows in (products.FEW_ROWS - 1, products.FEW_ROWS):
            layer(torch.ones(rows, 24, dtype=torch.bfloat16))
    assert seen == [products.FEW_ROWS] * 3


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 24), (2, 2, 8, 24)])
def test_a_widened_layer_takes_what_any_layer_takes(slow, shape):
    for layer in layers(torch.bfloat16):
        before = [x.shape for x in outcome(layer, torch.ones(shape, dtype=torch.bfloat16))]
        products.widen(torch.nn.ModuleList([layer]))
        assert [x.shape for x in outcome(layer, torch.ones(shape, dtype=torch.bfloat16))] == before


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
def test_compiled_blocks_multiply_in_fp32_too_without_a_break_in_their_code(slow):
    module = layers(torch.bfloat16)[0]
    products.widen(model := torch.nn.ModuleList([module]))
    x = torch.randn(20, 24, dtype=torch.bfloat16)
    expected = outcome(module, x)
    model[0].compile(backend="eager", fullgraph=True)
    for a, b in zip(outcome(module, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_widened_layer_leaves_wider_numbers_to_pytorch(slow, dtype):
    x = torch.randn(3, 24, dtype=dtype)
    for layer in layers(dtype):
        before = outcome(layer, x)
        products.widen(torch.nn.ModuleList([layer]))
        assert all(torch.equal(a, b) for a, b in zip(outcome(layer, x), before, strict=True))


def test_only_layers_that_pytorch_would_multiply_itself_are_widened(slow):
    class Quantized(torch.nn.Linear):
        """As bitsandbytes' layers are."""

    model = torch.nn.ModuleList([Quantized(3, 3), torch.nn.Embedding(3, 3), torch.nn.Linear(3, 3)])
    products.widen(model)
    assert [type(m) for m in model] == [Quantized, torch.nn.Embedding, products.WideLinear]


def test_nothing_is_widened_where_bf16_is_fast(monkeypatch):
    monkeypatch.setattr(products, "fp32_is_faster", lambda: False)
    model, x = layers(torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)
    products.widen(model)
    assert [type(m) for m in model] == [torch.nn.Linear, torch.nn.Linear, Conv1D]
    assert products.widened(x, None)[0] is x


def test_a_copy_of_a_widened_model_is_one_of_its_own_and_a_frozen_weight_gets_no_gradient(slow):
    layer = layers(torch.bfloat16)
    products.widen(layer)
    other = copy.deepcopy(layer)
    for p in layer.parameters():
        p.requires_grad_(False).zero_()
    x = torch.ones(1, 24, dtype=torch.bfloat16).requires_grad_()
    assert not layer[1](x).any() and other[1](x).any()
    layer[1](x).sum().backward()
    assert layer[1].weight.grad is None and x.grad is not None


def test_attention_and_head_are_closer_to_the_truth_by_way_of_fp32(monkeypatch):
    torch.manual_seed(0)
    length = max(s.end for s in SEGMENTS.items)
    tensors = [torch.randn(1, heads, length, 16) for heads in (4, 2, 2)]
    hidden, weight, targets = torch.randn(30, 64), torch.randn(300, 64), torch.arange(30)

    def results(dtype):
        inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (*tensors, hidden, weight)]
        attended = attend(*inputs[:3], SEGMENTS, None)
        logps = token_logps(*inputs[3:], None, targets)
        assert attended.dtype == dtype
        grads = torch.autograd.grad(attended.square().sum() + logps.square().sum(), inputs)
        return [attended.detach(), logps.detach(), *grads]

    def errors():
        return [float((a.double() - b).norm()) for a, b in zip(results(torch.bfloat16), truth, strict=True)]

    truth = results(torch.float64)
    monkeypatch.setattr(products, "fp32_is_faster", lambda: False)
    narrow = errors()
    monkeypatch.setattr(products, "fp32_is_faster", lambda: True)
    wide = errors()
    assert all(a < b for a, b in zip(wide, narrow, strict=True)), (wide, narrow)
    assert wide[1] < 1e-4 * float(truth[1].norm())  # log-probs: fp32 from end to end


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_of_a_widened_model_follow_those_of_fp32_under_every_zero_stage(slow, stage):
    """No farther away than those of 16-bit products, but for a tenth."""
    distributed.start()
    ids = torch.arange(1, 40)[None]
    states = {}
    for precision, wide in (("fp32", False), ("bf16", False), ("bf16", True)):
        module, optim = tiny.model("gpt2", dtype=engine.DTYPES[precision]), OptimConfig(lr=0.01)
        if wide:
            products.widen(module)
        # A tiny model's weights stay gathered under ZeRO-3 unless this is 0.
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        config = engine.build_config(
            {"zero_optimization": zero}, optim=optim, precision=precision, global_batch_size=1
        )
        trained = engine.start_training(module, config, optim)
        for _ in range(3):
            engine.backward(trained, trained(ids, labels=ids).loss, is_last=True)
            assert engine.step(trained, 0.01, None)[1] == "applied"
        states[precision, wide] = weights.full_state(trained.module, torch.float32, keep=True)
        engine.stop(trained)
    truth = states["fp32", False]
    narrow, found = (
        sum(float((states["bf16", wide][n] - truth[n]).square().sum()) for n in truth) ** 0.5 for wide in (False, True)
    )
    assert 0 < found <= 1.1 * narrow, (found, narrow)
