"""The gradient taken in the forward pass is the gradient: against autograd through plain log_softmax of full logits."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

import dpo.model.loss_in_forward
from dpo.data.batch import collate
from dpo.model import logits, products
from dpo.model.check import use_layout
from dpo.model.forward import Scorer, sums_by_sequence
from dpo.model.head import Head, token_logps
from dpo.model.loss_in_forward import chunks_of, total_loss
from dpo.types import LogitMap, TokenizedPair
from tests import tiny

HIDDEN = 6


def per_pair(chosen, rejected, pairs):
    """A loss that differs from pair to pair."""
    weights = torch.arange(1, 101, dtype=chosen.dtype, device=chosen.device)[pairs][: len(chosen)]
    return -logsigmoid(0.3 * (chosen - rejected)) * weights + 0.1 * chosen**2


def problem(count=5, weights=False, dtype=torch.float64, vocab=tiny.VOCAB):
    batch = collate(tiny.pairs(count), "shared")
    torch.manual_seed(0)
    if weights:
        batch = replace(batch, token_weights=torch.rand(len(batch.target_ids)))
    hidden = torch.randn(len(batch.target_ids), HIDDEN, dtype=torch.float64).to(dtype)
    weight, bias = (torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((vocab, HIDDEN), (vocab,)))
    return batch, hidden, weight, bias


def plain(batch, hidden, weight, bias, logit_map=None):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if logit_map is not None:
        cap = logit_map.softcap
        logits = logit_map.scale * logits if cap is None else cap * torch.tanh(logit_map.scale * logits / cap)
    logps = logits.log_softmax(dim=1).gather(1, batch.target_ids[:, None]).squeeze(1)
    logps = logps if batch.token_weights is None else logps * batch.token_weights
    sums = logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, logps)
    return per_pair(*sums.tensor_split(2), slice(None)).sum(), sums


@pytest.mark.parametrize("rows", [18, 24, 1000])
@pytest.mark.parametrize(("weights", "with_bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(scale=0.25), LogitMap(2.0, 1.5)])
def test_losses_sums_and_gradients_are_those_of_full_logits(rows, weights, with_bias, logit_map, monkeypatch):
    monkeypatch.setattr(dpo.model.loss_in_forward, "SLICE", 7)  # the gradient of the head in several parts
    batch, hidden, weight, bias = problem(weights=weights)
    chunks = chunks_of(batch.completion_sizes, rows)
    assert len(chunks) == {18: 3, 24: 2, 1000: 1}[rows]
    results = []
    ours = lambda b, h, w, c, m: total_loss(h, w, c, b, chunks, per_pair, m)  # noqa: E731
    for function in (plain, ours):
        leaves = [x.clone().requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]
        total, sums = function(batch, leaves[0], leaves[1], leaves[2] if with_bias else None, logit_map)
        results.append([total.detach(), sums.detach(), *torch.autograd.grad(3.7 * total, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_head_that_does_not_learn_costs_no_product(monkeypatch):
    batch, hidden, weight, _ = problem()
    calls = []
    original = dpo.model.loss_in_forward.product
    monkeypatch.setattr(dpo.model.loss_in_forward, "product", lambda a, b: calls.append(a.shape) or original(a, b))
    chunks = chunks_of(batch.completion_sizes, 1000)
    total, _ = total_loss(hidden.requires_grad_(), weight, None, batch, chunks, per_pair)
    total.backward()
    assert len(calls) == 1 and hidden.grad is not None and weight.grad is None
    total_loss(hidden, weight.requires_grad_(), None, batch, chunks, per_pair)
    assert len(calls) == 3


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8), rows=st.integers(1, 20))
def test_chunks_are_whole_pairs_in_order_that_fill_no_more_than_a_tile(sizes, rows):
    flat = tuple([c for c, _ in sizes] + [r for _, r in sizes])
    chunks = chunks_of(flat, rows)
    if not sizes or max(c + r for c, r in sizes) > rows:
        assert chunks is None
        return
    starts = [sum(flat[:i]) for i in range(len(flat) + 1)]
    covered = []
    for chunk in chunks:
        mine = range(chunk.pairs.start, chunk.pairs.stop)
        covered += mine
        assert sum(sum(sizes[i]) for i in mine) <= rows
        n = len(sizes)
        assert (chunk.chosen.start, chunk.chosen.stop) == (starts[mine[0]], starts[mine[-1] + 1])
        assert (chunk.rejected.start, chunk.rejected.stop) == (starts[n + mine[0]], starts[n + mine[-1] + 1])
    assert covered == list(range(len(sizes)))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7),
    rows=st.integers(18, 40),
)
@example(lengths=[(1, 1, 1)], rows=18)  # one pair, one token each
@example(lengths=[(1, 9, 9), (5, 1, 1), (1, 1, 9)], rows=18)  # the first fills a tile
def test_gradients_over_random_lengths_are_those_of_full_logits(lengths, rows):
    rng = np.random.default_rng(0)
    ids = [[rng.integers(1, tiny.VOCAB, n).astype(np.int32) for n in three] for three in lengths]
    batch = collate([TokenizedPair(i, *three) for i, three in enumerate(ids)], "shared")
    torch.manual_seed(0)
    sizes = (len(batch.target_ids), HIDDEN), (tiny.VOCAB, HIDDEN)
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes]
    found, sums = total_loss(*leaves, None, batch, chunks_of(batch.completion_sizes, rows), per_pair)
    truth, expected = plain(batch, *leaves, None)
    torch.testing.assert_close((found, sums), (truth, expected), rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_too_errors_in_16_bits_are_at_most_a_tenth_above_those_of_full_logits(dtype):
    batch, hidden, weight, _ = problem(count=40, vocab=501)
    batch, chunks = batch.to("cuda"), chunks_of(batch.completion_sizes, 100)
    leaves = [x.cuda().to(dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(plain(batch, *exact, None)[0], exact)

    def errors(total):
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(torch.autograd.grad(total, leaves), truth,
                                                                          strict=True)]  # fmt: skip

    def of_float(h, w):
        logps = (h @ w.T).float().log_softmax(dim=1).gather(1, batch.target_ids[:, None]).squeeze(1)
        sums = logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, logps)
        return per_pair(*sums.tensor_split(2), slice(None)).sum()

    theirs = errors(of_float(*leaves))
    for total in (
        total_loss(*leaves, None, batch, chunks, per_pair)[0],
        per_pair(*sums_by_sequence(token_logps(*leaves, None, batch.target_ids, 10_000), batch).tensor_split(2),
                 slice(None)).sum(),
    ):  # fmt: skip
        assert all(a <= 1.1 * b for a, b in zip(errors(total), theirs, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_gradient_of_a_model_is_that_of_the_plain_path(family, tied):
    changes = {} if family == "gpt2" else {"tie_word_embeddings": tied}
    pairs = tiny.pairs(6)
    results = []
    for in_forward in (False, True):
        scorer = Scorer(tiny.model(family, **changes), chunk_rows=30)
        use_layout(scorer, "shared")
        batch = collate(pairs, "shared")
        if in_forward:
            total, _ = scorer(batch, pair_losses=per_pair)
        else:
            total = per_pair(*scorer(batch).tensor_split(2), slice(None)).sum()
        total.backward()
        results.append({name: p.grad for name, p in scorer.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for name, truth in results[0].items():
        torch.testing.assert_close(results[1][name], truth, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_the_plain_path(monkeypatch, dtype, scale):
    """fp16 with gradients, or a scale of the logits, so small that a tile scaled by them would round to nothing."""
    monkeypatch.setattr(products, "fp32_is_faster", lambda: False)
    batch, hidden, weight, _ = problem(count=40, vocab=500)
    small = 2e-5 if dtype == torch.float16 else 1.0
    chunks = chunks_of(batch.completion_sizes, 100)

    def errors(function):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        found = torch.autograd.grad(function(*leaves) / small, leaves)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]

    def losses(chosen, rejected, pairs):
        return -logsigmoid(0.1 * (chosen - rejected)) * small

    def of_plain(h, w):
        logps = token_logps(h, w, None, batch.target_ids, 10_000, LogitMap(scale))
        sums = logps.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, logps)
        return losses(*sums.tensor_split(2), slice(None)).sum()

    exact = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad(of_plain(*exact) / small, exact)
    ours = errors(lambda h, w: total_loss(h, w, None, batch, chunks, losses, LogitMap(scale))[0])
    theirs = errors(of_plain)
    assert all(a <= 1.1 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert max(ours) < (1e-3 if dtype == torch.float16 else 5e-3)


class Wide(TorchDispatchMode):
    """Counts the bytes of living tensors as wide as the vocabulary, but for the weight's, and their most."""

    def __init__(self, vocab):
        self.vocab, self.alive, self.most = vocab, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and self.vocab in tensor.shape:
                storage = tensor.untyped_storage()
                if HIDDEN not in tensor.shape and storage.data_ptr() not in self.alive:
                    self.alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage.data_ptr())
                self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(("in_forward", "dtype", "in_fp32", "softcap", "tiles"), [
    (True, torch.float32, False, None, 1), (True, torch.bfloat16, False, None, 1.5),
    (False, torch.float32, False, None, 1), (False, torch.bfloat16, False, None, 1.5),
    (False, torch.bfloat16, True, None, 1), (True, torch.float32, False, 5.0, 1.1),
    (False, torch.float32, False, 5.0, 1.1),
])  # fmt: skip
def test_memory_as_wide_as_the_vocabulary_is_one_fp32_tile_however_many_tokens(
    monkeypatch, in_forward, dtype, in_fp32, softcap, tiles
):
    """Beside it the 16-bit copy that a product takes, or the slopes of a few rows."""
    monkeypatch.setattr(logits, "SLOPE_ROWS", 2)
    monkeypatch.setattr(products, "fp32_is_faster", lambda: in_fp32)
    batch, hidden, weight, _ = problem(count=60, vocab=501)
    rows = len(hidden) // 10
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    with Wide(501) as seen:
        if in_forward:
            chunks = chunks_of(batch.completion_sizes, rows)
            assert len(chunks) > 8
            total, _ = total_loss(hidden, weight, None, batch, chunks, per_pair, LogitMap(softcap=softcap))
        else:
            total = token_logps(hidden, weight, None, batch.target_ids, rows, LogitMap(softcap=softcap)).sum()
        assert not seen.alive, "logits are kept for backward"
        total.backward()
    assert 0 < seen.most <= tiles * 4 * 501 * (rows + 1)


@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(scale=0.5), LogitMap(softcap=2.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_vocabulary_padded_to_a_multiple_changes_neither_log_probs_nor_gradients(bias, logit_map):
    """Under a soft-cap, which an added token's -inf would not survive, it is not padded."""
    batch, hidden, _, _ = problem()
    layer = torch.nn.Linear(HIDDEN, tiny.VOCAB, bias=bias, dtype=torch.float64)
    results = []
    chunks = chunks_of(batch.completion_sizes, 24)
    for multiple in (1, 64):
        for instead in (None, lambda h, w, b: total_loss(h, w, b, batch, chunks, per_pair, logit_map)):
            head, h = Head(layer, logit_map=logit_map), hidden.clone().requires_grad_()
            head.multiple = multiple
            layer.zero_grad()
            out = head(h, batch.target_ids, instead)
            (out if instead is None else out[0]).sum().backward()
            results.append([h.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(results[0] + results[1], results[2] + results[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
