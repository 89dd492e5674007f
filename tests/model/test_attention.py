"""Every kernel path attends as each sequence alone: its gather, its index tensors, its backward, its refusals.

The CUDA kernels are stood in for by their twins, which take the same arguments; a kernel itself is compared with its
twin by the self-test, on a GPU.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from dpo.data.batch import collate, index_segments
from dpo.model import attention, attention_flex, attention_varlen
from dpo.model.blocks import compile_blocks
from dpo.model.check import settle, use_layout
from dpo.model.forward import Scorer, own_logits_logps
from dpo.types import Segment, TokenizedPair
from tests import tiny

CPU = torch.device("cpu")
TWINS = ("varlen_eager", "flex_eager")


def pairs_of(lengths) -> list[TokenizedPair]:
    rng = np.random.default_rng(0)
    ids = [[rng.integers(1, tiny.VOCAB, n).astype(np.int32) for n in three] for three in lengths]
    return [TokenizedPair(i, *three) for i, three in enumerate(ids)]


def gradients(scorer, pairs, layout, row_tokens=None):
    logps = scorer(collate(pairs, layout, row_tokens=row_tokens))
    scorer.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in scorer.parameters() if p.grad is not None)]


def scorer_of(model, layout, backend="sdpa") -> Scorer:
    scorer = Scorer(model)
    use_layout(scorer, layout, backend=backend)
    return scorer


@pytest.mark.parametrize("backend", ["sdpa", *TWINS])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_backend_has_the_log_probs_and_gradients_of_padded(family, backend):
    pairs = tiny.pairs(5)
    truth = gradients(scorer_of(tiny.model(family), "padded"), pairs, "padded")
    for layout, row_tokens in (("shared", None), ("packed", None), ("shared", 400)):
        found = gradients(scorer_of(tiny.model(family), layout, backend), pairs, layout, row_tokens)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


LENGTHS = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, tail=st.integers(0, 300), layout=st.sampled_from(["shared", "packed", "chosen"]))
def test_index_tensors_say_of_any_lengths_what_the_segments_say(lengths, tail, layout):
    segments = collate(pairs_of(lengths), layout, row_tokens=tail).segments
    length = segments.items[-1].end
    assert [s.start for s in segments.items] == [0, *(s.end for s in segments.items[:-1])]
    assert segments.cu_q.tolist() == [0, *(s.end for s in segments.items)]
    keys = [[*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)] for s in segments.items]
    assert segments.kv_index.tolist() == sum(keys, [])
    assert segments.cu_k.tolist() == [0, *np.cumsum([len(k) for k in keys])]
    assert (segments.longest_q, segments.longest_k) == (
        max(s.end - s.start for s in segments.items), max(map(len, keys)),
    )  # fmt: skip
    assert segments.kv_index[segments.own].tolist() == list(range(length))
    assert segments.kv_index[segments.copies].tolist() == segments.shared.tolist()
    uses = sorted(segments.own.tolist() + segments.copies.tolist())
    assert uses == list(range(len(segments.kv_index)))


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, tail=st.integers(0, 60))
@example(lengths=[(1, 1, 1)], tail=0)
@example(lengths=[(1, 9, 1), (9, 1, 9)], tail=1)
def test_every_backend_agrees_over_random_lengths(lengths, tail):
    segments = collate(pairs_of(lengths), "shared", row_tokens=tail).segments
    length = segments.items[-1].end
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, length, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(1, length, 4, 4, dtype=torch.float64)
    results = []
    for backend in ("sdpa", *TWINS):
        output = attention.BACKENDS[backend](*inputs, segments, 0.3)
        results.append([output, *torch.autograd.grad(output, inputs, weights)])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_gathers_backward_is_that_of_indexing():
    segments = collate(tiny.pairs(4), "shared").segments
    x = torch.randn(segments.items[-1].end, 2, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(len(segments.kv_index), 2, 3, dtype=torch.float64)
    assert len(segments.copies) > 0
    gathered, plain = attention_varlen.gather(x, segments), x[segments.kv_index]
    torch.testing.assert_close(gathered, plain, rtol=0, atol=0)
    found, truth = (torch.autograd.grad(y, x, grad)[0] for y in (gathered, plain))
    torch.testing.assert_close(found, truth, rtol=1e-14, atol=1e-14)


def test_nothing_is_gathered_where_no_prompt_is_shared():
    segments = collate(tiny.pairs(4), "packed").segments
    x = torch.randn(segments.items[-1].end, 2, 3)
    assert attention_varlen.gather(x, segments) is x


def test_a_row_in_three_segments_is_refused():
    with pytest.raises(AssertionError, match="not in three"):
        index_segments([Segment(0, 4), Segment(4, 6, 0, 3), Segment(6, 8, 0, 2)])


def test_whole_blocks_are_not_asked_about_row_by_row():
    segments = index_segments([Segment(0, 600), Segment(600, 1024, 0, 300)])
    some, every = attention_flex.seen_blocks(segments, 1024, None)
    assert every.astype(int).tolist() == [
        [0] * 8, [1] + [0] * 7, [1, 1] + [0] * 6, [1, 1, 1] + [0] * 5,
        [0] * 8,  # of both segments
        [1, 1] + [0] * 6, [1, 1, 0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0],
    ]
    assert some[6].tolist() == [True, True, True, False, True, True, True, False]


@settings(deadline=None, max_examples=40)
@example(lengths=[(300, 200, 500)], window=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 500),
)
def test_the_blocks_that_flex_looks_at_are_those_of_the_whole_mask(lengths, window):
    items, at = [], 0
    for p, c, r in lengths:
        items += [Segment(at, at + p + c), Segment(at + p + c, at + p + c + r, at, at + p)]
        at += p + c + r
    segments = index_segments(items)
    visible = attention_flex.visible_rows(segments, window)
    rows = torch.arange(at)
    mask = torch.nn.functional.pad(visible(0, 0, rows[:, None], rows[None, :]), (0, -at % 128, 0, -at % 128))
    blocks = mask.view(len(mask) // 128, 128, -1, 128).transpose(1, 2)
    some, every = attention_flex.seen_blocks(segments, at, window)
    assert torch.equal(torch.from_numpy(some), blocks.any(-1).any(-1))
    whole = blocks.all(-1).all(-1)  # a block of two segments that see the same is asked about all the same
    assert not (torch.from_numpy(every) & ~whole).any() and (window is None or not every.any())
    made, truth = (
        attention_flex.block_mask(segments, at, window, torch.device("cpu")),
        create_block_mask(visible, None, None, at, at, device="cpu"),
    )
    assert torch.equal(made.to_dense(), truth.to_dense())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (4, 1.5)])
def test_flex_attention_itself_computes_what_its_twin_does(window, softcap):
    segments = collate(tiny.pairs(4), "shared", row_tokens=150).segments
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, segments.items[-1].end, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    found = attention_flex.attend(*inputs, segments, 0.4, window, softcap)
    truth = attention_flex.eager(*inputs, segments, 0.4, window, softcap)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    assert list(segments.made) == [window]


@pytest.mark.parametrize(("family", "changes"), [("gemma2", {"sliding_window": 5}), ("mistral", {"sliding_window": 4})])
def test_soft_caps_and_short_windows_are_exact_in_the_shared_layout_by_flex(family, changes):
    if family == "gemma2":
        changes = changes | {"final_logit_softcapping": None, "attn_logit_softcapping": 3.0}
    pairs = tiny.pairs(5)
    scorer = scorer_of(tiny.model(family, **changes), "shared", "flex_eager")
    scorer.native_attention = "eager"  # the only one of transformers that soft-caps
    with torch.no_grad():
        truth = torch.stack([own_logits_logps(scorer, pair, CPU) for pair in pairs]).T.reshape(-1)
        torch.testing.assert_close(scorer(collate(pairs, "shared")), truth, rtol=1e-6, atol=1e-6, check_dtype=False)
    wide = scorer_of(tiny.model(family, **changes | {"sliding_window": 500}), "shared", "flex_eager")
    assert not torch.allclose(wide(collate(pairs, "shared")).double(), truth.double(), atol=1e-3)


OWN_SIZES = (attention.Asked(6, 2, 24, 16, scaling=0.3), attention.Asked(5, 1, 128, 128))
OWN_SCORES = (
    attention.Asked(4, 2, 32, 32, softcap=2.0),
    attention.Asked(4, 4, 64, 64, has_window=True),
    attention.Asked(4, 1, 16, 16, scaling=0.5, softcap=3.0, has_window=True),
)


@pytest.mark.parametrize("backend", ["sdpa", *TWINS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_honest_backends_pass_the_self_test(backend, dtype):
    assert attention.self_test(backend, dtype, CPU) is None
    assert attention.self_test(backend, dtype, CPU, OWN_SIZES) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("part", ["softcap", "window", "scaling"])
def test_the_self_test_sees_scores_that_are_changed_in_another_way(part, dtype, monkeypatch):
    assert attention.self_test("flex_eager", dtype, CPU, OWN_SCORES) is None

    def wrong(query, key, value, segments, scaling, window=None, softcap=None):
        changed = {"scaling": scaling, "window": window, "softcap": softcap} | {part: None}
        return attention_flex.eager(query, key, value, segments, **changed)

    monkeypatch.setitem(attention.BACKENDS, "flex", wrong)
    monkeypatch.setattr(attention, "_unavailable", lambda *_: None)
    assert "its output is off" in attention.self_test("flex", dtype, CPU, OWN_SCORES)


def test_a_kernel_that_refuses_the_models_own_heads_in_backward_alone_is_passed_over(monkeypatch):
    """As flash kernels of some GPUs refuse large heads; the first backward pass would end the run."""

    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.clone()

        @staticmethod
        def backward(ctx, grad):
            if grad.shape[-1] != 64:
                raise RuntimeError("backward takes heads of 64")
            return grad

    def kernel(*inputs):
        return Picky.apply(attention_varlen.eager(*inputs))

    monkeypatch.setitem(attention.BACKENDS, "varlen", lambda *inputs: attention_varlen.attend(kernel, *inputs))
    monkeypatch.setattr(attention, "_unavailable", lambda *_: None)
    scorer = Scorer(tiny.model("llama"))
    layout, notes = settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU, "varlen")
    assert (layout, scorer.attention) == ("shared", "sdpa")
    assert notes == ["layout shared by varlen is not used: RuntimeError: backward takes heads of 64"]


def test_a_model_is_watched_for_what_it_asks_of_a_kernel():
    scorer = scorer_of(tiny.model("gemma2", attn_logit_softcapping=20.0, sliding_window=6), "shared", "flex_eager")
    with attention.watched_calls("flex_eager") as calls, torch.no_grad():
        scorer(collate(tiny.pairs(3), "shared"))
    config = scorer.model.config
    sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim
    scaling = config.query_pre_attn_scalar**-0.5
    assert calls == [attention.Asked(*sizes, scaling, 20.0, has_window) for has_window in (True, False)]


def test_a_compiled_kernel_caps_scores_and_is_compiled_once_for_all_caps():
    """By inductor's code for a CPU, which cannot express the segments: the score's function alone."""
    torch._dynamo.reset()
    counters.clear()
    kernel, graphs = attention_flex._kernel(True), []
    rows = torch.arange(300)
    for length, softcap in ((300, 20.0), (173, 5.0), (290, 7.0)):
        q, k, v = (torch.randn(1, 2, length, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        with torch.no_grad():
            found = kernel(q, k, v, score_mod=attention_flex.capped(torch.full((), softcap)), block_mask=mask)
        scores = softcap * torch.tanh(q @ k.mT / 4 / softcap)
        hidden = rows[:length, None] < rows[None, :length]
        truth = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]
    torch._dynamo.reset()


def top_left(query, key, value, segments, scaling):
    """The twin with its causal mask aligned to the top left, as cuDNN's is: a prompt's continuation sees too little."""
    outputs = []
    bounds = segments.cu_q[:-1], segments.cu_q[1:], segments.cu_k[:-1]
    for a, b, c in zip(*(x.tolist() for x in bounds), strict=True):
        one = index_segments([Segment(0, b - a)])
        outputs.append(attention_varlen.eager(query[a:b], key[c : c + b - a], value[c : c + b - a], one, scaling))
    return torch.cat(outputs)


def not_grouped(query, key, value, segments, scaling):
    """A kernel that pairs query heads with key heads the wrong way round."""
    repeats = query.shape[1] // key.shape[1]
    return attention_varlen.eager(query, key.repeat(1, repeats, 1), value.repeat(1, repeats, 1), segments, scaling)


def broken_backward(query, key, value, segments, scaling):
    """Right outputs, no gradient to the keys."""
    return attention_varlen.eager(query, key.detach(), value, segments, scaling) + 0 * key.sum()


def refusing(*_):
    raise RuntimeError("GQA is not supported\nwith the cuDNN backend.")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (top_left, "self-test with 4 of 4 key heads of 64: its output is off"),
        (not_grouped, "self-test with 2 of 4 key heads of 64: its output is off"),
        (broken_backward, "its gradient of the key is off"),
        (refusing, "RuntimeError: GQA is not supported with the cuDNN backend."),
    ],
)
def test_a_kernel_that_computes_something_else_is_refused_and_sdpa_takes_over(kernel, reason, monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "varlen", lambda *inputs: attention_varlen.attend(kernel, *inputs))
    monkeypatch.setattr(attention, "_unavailable", lambda *_: None)
    scorer = Scorer(tiny.model("llama"))
    layout, notes = settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU, "varlen")
    assert (layout, scorer.attention, len(notes)) == ("shared", "sdpa", 1)
    assert notes[0].startswith("layout shared by varlen is not used: ") and reason in notes[0]


def test_a_kernel_that_passes_is_used(monkeypatch):
    monkeypatch.setattr(attention, "candidates", lambda wanted, device: ["varlen_eager", "sdpa"])
    scorer = Scorer(tiny.model("llama"))
    assert settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU) == ("shared", [])
    assert scorer.attention == "varlen_eager"


def test_a_model_with_a_short_window_passes_over_kernels_that_do_not_know_it_and_ends_on_flex(monkeypatch):
    monkeypatch.setattr(attention, "candidates", lambda wanted, device: ["varlen_eager", "flex_eager", "sdpa"])
    scorer = Scorer(tiny.model("mistral", sliding_window=4))
    layout, notes = settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU)
    assert (layout, scorer.attention) == ("shared", "flex_eager")
    assert notes == [
        "layout shared by varlen_eager is not used: a sliding window of 4 tokens is shorter than sequences of up to 100"
    ]


def test_a_kernel_that_refuses_the_models_own_sizes_is_passed_over(monkeypatch):
    """The self-test asks for heads of 64; a model's may be others."""

    def picky(query, *rest):
        if query.shape[-1] != 64:
            raise RuntimeError("head sizes must be 64")
        return attention_varlen.attend(attention_varlen.eager, query, *rest)

    monkeypatch.setitem(attention.BACKENDS, "varlen", picky)
    monkeypatch.setattr(attention, "_unavailable", lambda *_: None)
    scorer = Scorer(tiny.model("llama"))
    layout, notes = settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU, "varlen")
    assert (layout, scorer.attention) == ("shared", "sdpa")
    assert notes == ["layout shared by varlen is not used: head sizes must be 64"]


@pytest.mark.parametrize("wanted", ["varlen", "flash", "flex"])
def test_kernels_that_need_a_gpu_say_so_on_a_cpu(wanted):
    scorer = Scorer(tiny.model("llama"))
    layout, notes = settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU, wanted)
    assert (layout, scorer.attention) == ("shared", "sdpa")
    assert notes == [f"layout shared by {wanted} is not used: it needs a GPU"]


def test_flash_kernels_are_refused_to_fp32_and_auto_prefers_them_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert attention.self_test("varlen", torch.float32, gpu) == "it takes fp16 and bf16, and the policy is in float32"
    assert attention.candidates("auto", gpu) == ["varlen", "flex", "sdpa"]
    assert attention.candidates("auto", CPU) == ["sdpa"]
    assert attention.candidates("flex", gpu) == ["flex", "sdpa"]


def test_flash_attn_is_tried_where_it_is_installed(monkeypatch):
    installed = types.ModuleType("flash_attn")
    installed.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", installed)
    assert attention.candidates("auto", torch.device("cuda")) == ["varlen", "flash", "flex", "sdpa"]


@pytest.mark.parametrize(
    ("parameters", "kv_heads", "expected"),
    [
        ({"is_causal", "scale"}, 4, ({"is_causal": True, "scale": 0.5}, False)),
        ({"is_causal", "scale"}, 2, ({"is_causal": True, "scale": 0.5}, True)),
        ({"window_size", "scale", "enable_gqa"}, 2,
         ({"window_size": (-1, 0), "scale": 0.5, "enable_gqa": True}, False)),
        ({"window_size", "scale", "enable_gqa"}, 4, ({"window_size": (-1, 0), "scale": 0.5}, False)),
    ],
)  # fmt: skip
def test_every_signature_of_varlen_attn_is_told_of_causality_and_groups(parameters, kv_heads, expected):
    found = attention_varlen.arguments_of(parameters, heads=4, kv_heads=kv_heads, scaling=0.5)
    assert found == expected


@pytest.mark.parametrize(("parameters", "missing"), [({"scale"}, "neither"), ({"window_size"}, "no scale")])
def test_a_varlen_attn_that_cannot_be_causal_or_scaled_is_refused(parameters, missing):
    with pytest.raises(NotImplementedError, match=missing):
        attention_varlen.arguments_of(parameters, heads=4, kv_heads=4, scaling=0.5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_torchs_and_flash_attns_kernels_get_what_the_twin_gets(deterministic, monkeypatch):
    """Both are called with (T, heads, d) tensors, cu_seqlens and bounds: played by the twin, all logs stay the same."""
    calls = []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)

    def play(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False, **flash):
        calls.append((window_size, enable_gqa, flash.get("causal"), flash.get("deterministic", False), max_q, max_k))
        assert q.is_contiguous() and cu_q.dtype == cu_k.dtype == torch.int32
        segments = types.SimpleNamespace(cu_q=cu_q, cu_k=cu_k)
        return attention_varlen.eager(q, k, v, segments, flash.get("softmax_scale", scale))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", play)
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = play
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    pairs = tiny.pairs(5)
    truth = gradients(scorer_of(tiny.model("llama"), "padded"), pairs, "padded")
    for backend, made in (("varlen", attention_varlen.torch_varlen), ("flash", attention_varlen.flash)):
        made.cache_clear()
        found = gradients(scorer_of(tiny.model("llama"), "shared", backend), pairs, "shared")
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        made.cache_clear()
    segments = collate(pairs, "shared").segments
    bounds = (segments.longest_q, segments.longest_k)
    assert set(calls) == {((-1, 0), True, None, False, *bounds), ((-1, -1), False, True, deterministic, *bounds)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
@pytest.mark.parametrize("backend", ["sdpa", "varlen_eager"])
def test_compiled_blocks_compile_once_for_all_batches_of_one_shape(backend):
    """Traced and run eagerly: that the code inductor makes is right is PyTorch's to test."""
    torch._dynamo.reset()
    counters.clear()
    scorer = scorer_of(tiny.model("llama"), "shared", backend)
    plain = scorer_of(tiny.model("llama"), "shared", backend)
    assert compile_blocks(scorer.model, "eager") == 2
    made = []
    for seed in range(4):
        pairs = tiny.pairs(5, seed=seed)
        found, truth = (gradients(s, pairs, "shared", 256) for s in (scorer, plain))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] > 0 and len(set(made)) == 1 and not counters["recompiles"]
    gradients(scorer, pairs, "shared", 300)
    assert counters["stats"]["unique_graphs"] > made[0]
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["varlen", "flash", "flex", "sdpa"])
def test_the_kernels_of_a_gpu_pass_the_self_test(backend, dtype):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    device = torch.device("cuda")
    assert attention.self_test(backend, dtype, device) is None
    others = OWN_SCORES if backend == "flex" else (attention.Asked(12, 12, 64, 64), attention.Asked(32, 8, 128, 128))
    assert attention.self_test(backend, dtype, device, others) is None
