"""The layouts are schedules: log-probs and every gradient are those of each sequence scored alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from dpo.data.batch import collate
from dpo.data.planner import Layout
from dpo.errors import UserError
from dpo.model import logits, products
from dpo.model.check import TOLERANCE, _difference, settle, use_layout
from dpo.model.forward import Scorer, own_logits_logps, pair_logps, sums_by_sequence
from dpo.model.head import token_logps
from dpo.types import LogitMap, TokenizedPair
from tests import tiny

LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")
CPU = torch.device("cpu")


def scorer_for(family: str, layout: Layout, **kwargs) -> Scorer:
    scorer = Scorer(tiny.model(family, **kwargs))
    use_layout(scorer, layout)
    return scorer


def gradients(
    scorer: Scorer, pairs: list[TokenizedPair], layout: Layout
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = scorer(collate(pairs, layout))
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    scorer.zero_grad()
    (logps * weights).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_layouts_have_the_log_probs_of_each_sequence_alone(family):
    pairs = tiny.pairs(5)
    for layout in LAYOUTS:
        scorer = scorer_for(family, layout)
        truth = torch.stack([own_logits_logps(scorer, pair, CPU) for pair in pairs]).T.reshape(-1)
        with torch.no_grad():
            torch.testing.assert_close(scorer(collate(pairs, layout)), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shared_and_packed_layouts_have_the_gradients_of_padded(family):
    pairs = tiny.pairs(5)
    logps, truth = gradients(scorer_for(family, "padded"), pairs, "padded")
    assert any(float(g.abs().max()) > 1e-3 for g in truth.values())
    for layout in ("shared", "packed"):
        other_logps, found = gradients(scorer_for(family, layout), pairs, layout)
        torch.testing.assert_close(other_logps, logps, rtol=1e-9, atol=1e-9)
        assert found.keys() == truth.keys()
        for name in truth:
            torch.testing.assert_close(found[name], truth[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changing_rejected_never_moves_chosen_log_probs(layout):
    first, second = tiny.pairs(4, seed=1), tiny.pairs(4, seed=2)
    both = zip(first, second, strict=True)
    changed = [replace(a, rejected_ids=b.rejected_ids, rejected_scored=b.rejected_scored) for a, b in both]
    scorer = scorer_for("llama", layout)
    with torch.no_grad():
        before, after = (pair_logps(scorer, collate(p, layout)) for p in (first, changed))
    torch.testing.assert_close(after.chosen, before.chosen, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after.rejected, before.rejected)


def test_layouts_really_differ_in_what_the_first_layer_is_fed():
    pairs = tiny.pairs(5)
    p, c, r = (sum(len(getattr(pair, f"{name}_ids")) for pair in pairs) for name in ("prompt", "chosen", "rejected"))
    widest = max(len(x.prompt_ids) + max(len(x.chosen_ids), len(x.rejected_ids)) for x in pairs)
    expected = {"shared": (1, p + c + r), "packed": (1, 2 * p + c + r), "padded": (10, widest), "chosen": (1, p + c)}
    for layout, shape in expected.items():
        scorer = scorer_for("llama", layout)
        seen = []
        layer = scorer.model.model.layers[0]
        layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[:2]))
        scorer(collate(pairs, layout))
        assert seen == [shape], layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_micro_batch_is_one_call_of_the_backbone(layout):
    scorer = scorer_for("gpt2", layout)
    calls = []
    scorer.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    scorer(collate(tiny.pairs(4), layout))
    assert len(calls) == 1


MAPS = [LogitMap(), LogitMap(scale=0.25), LogitMap(softcap=2.0), LogitMap(3.0, 1.5)]


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_head_chunks_change_neither_log_probs_nor_gradients(rows, logit_map):
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8, dtype=torch.float64), torch.randn(17, 8, dtype=torch.float64)
    targets = torch.randint(17, (10,))
    results = []
    for chunk in (1000, rows):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = token_logps(h, w, None, targets, chunk, logit_map)
        (logps * torch.arange(10.0)).sum().backward()
        results.append((logps.detach(), h.grad, w.grad))
    full = logit_map.scale * hidden @ weight.T
    if logit_map.softcap:
        full = logit_map.softcap * torch.tanh(full / logit_map.softcap)
    truth = torch.log_softmax(full, dim=1)[torch.arange(10), targets]
    torch.testing.assert_close(results[1][0], truth, rtol=1e-12, atol=1e-12)
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("bias", [False, True])
def test_head_gradients_equal_finite_differences(bias, logit_map):
    """With recomputed tiles: a kept one is overwritten in backward, and gradcheck goes back more than once."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    shift = torch.randn(9, dtype=torch.float64).requires_grad_() if bias else None
    targets = torch.randint(9, (5,))

    def logps(h, w, *b):
        return token_logps(h, w, b[0] if b else None, targets, 3, logit_map)

    inputs = (hidden.requires_grad_(), weight.requires_grad_(), *([shift] if bias else []))
    assert torch.autograd.gradcheck(logps, inputs)


@pytest.mark.parametrize("scale", [1, 60])
def test_slopes_of_a_soft_cap_are_exact_where_it_is_reached_and_where_probabilities_vanish(scale, monkeypatch):
    """They are computed from the softmax, a few rows at a time; in fp32 probabilities under 1e-38 are lost."""
    monkeypatch.setattr(logits, "SLOPE_ROWS", 3)
    torch.manual_seed(0)
    hidden, weight = (scale * torch.randn(8, 16)).requires_grad_(), torch.randn(33, 16).requires_grad_()
    targets, cap = torch.randint(33, (8,)), 60.0
    found = torch.autograd.grad(
        token_logps(hidden, weight, None, targets, logit_map=LogitMap(softcap=cap)).sum(), (hidden, weight)
    )
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logps = (cap * torch.tanh(wide[0] @ wide[1].T / cap)).log_softmax(dim=1)
    truth = torch.autograd.grad(logps.gather(1, targets[:, None]).sum(), wide)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=float(1e-5 * b.abs().max()))


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do():
    hidden, weight = torch.randn(5, 4).requires_grad_(), torch.randn(9, 4)
    token_logps(hidden, weight, None, torch.zeros(5, dtype=torch.int64)).sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_tensor_of_all_logits_exists(monkeypatch):
    """The widest vocabulary-sized tensor has one row per completion token, and at most a chunk of them."""
    pairs = tiny.pairs(6, longest=20)
    scorer = Scorer(tiny.model("llama"), chunk_rows=16)
    use_layout(scorer, "shared")
    seen = []
    head = torch.nn.functional.linear

    def spy(x, w, b=None):
        if w.shape[0] == tiny.VOCAB:
            seen.append(x.shape[0])
        return head(x, w, b)

    monkeypatch.setattr("dpo.model.logits.linear", spy)
    scorer(collate(pairs, "shared"))
    assert sum(seen) == sum(sum(p.targets) for p in pairs) < sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert max(seen) <= 16


def test_an_empty_batch_scores_nothing_and_reaches_every_parameter():
    for layout in LAYOUTS:
        scorer = scorer_for("gpt2", layout)
        logps = scorer(collate([], layout))
        assert logps.shape == (0,)
        logps.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in scorer.model.transformer.h.parameters())


def test_an_empty_batch_reaches_the_bias_of_the_head():
    """Ranks that have pairs reduce its gradient, and one that has none must take part."""
    model = tiny.model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCAB, dtype=torch.float64))
    scorer = Scorer(model)
    scorer(collate([], "shared")).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()]
    assert missing == []


def test_sums_of_log_probs_do_not_depend_on_the_order_in_which_tokens_come():
    batch = collate([TokenizedPair(0, *(np.arange(1, n, dtype=np.int32) for n in (3, 4000, 4000)))], "packed")
    logps = -3 * torch.rand(len(batch.target_ids), generator=torch.Generator().manual_seed(0))
    orders = [torch.randperm(len(logps), generator=torch.Generator().manual_seed(i)) for i in range(20)]
    found = {
        tuple(sums_by_sequence(logps[order], replace(batch, sequence_ids=batch.sequence_ids[order])).tolist())
        for order in orders
    }
    assert len(found) == 1 and next(iter(found)) == pytest.approx([float(x.sum()) for x in logps.chunk(2)], rel=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_that_share_prompts_keep_the_layout_asked_for(family):
    assert settle(Scorer(tiny.model(family)), "shared", tiny.pairs(3)[1:], 100, CPU) == ("shared", [])


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "soft-capped"),
        ("mistral", {"sliding_window": 4}, "sliding window"),
        ("bloom", {}, "own attention code"),
        ("mamba", {}, "0 of 2 layers attend"),
    ],
)
def test_other_families_fall_back_to_padded_with_the_reason_and_true_log_probs(family, changes, reason):
    scorer = Scorer(tiny.model(family, **changes))
    pairs = tiny.pairs(4)
    layout, notes = settle(scorer, "shared", pairs[1:3], 100, CPU)
    assert layout == "padded"
    assert reason in notes[0]
    truth = torch.stack([own_logits_logps(scorer, pair, CPU) for pair in pairs]).T.reshape(-1)
    with torch.no_grad():
        torch.testing.assert_close(scorer(collate(pairs, layout)), truth, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(("family", "layout", "logit_map"), [
    ("gemma2", "padded", LogitMap(softcap=2.0)), ("cohere", "shared", LogitMap(scale=0.25)),
    ("granite", "shared", LogitMap(scale=0.125)), ("mistral", "shared", LogitMap()),
])  # fmt: skip
def test_scaled_and_capped_logits_have_the_gradients_of_the_models_own_without_being_whole(family, layout, logit_map):
    scorer = Scorer(tiny.model(family))
    assert settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU)[0] == layout
    assert not scorer.own_head and scorer.head.logit_map == logit_map
    batch, results = collate(tiny.pairs(3), layout), []
    for own_head in (False, True):
        if own_head:
            use_layout(scorer, "padded", own_head=True)
            batch = collate(tiny.pairs(3), "padded")
        scorer.zero_grad()
        (scorer(batch) * torch.arange(1, 7)).sum().backward()
        results.append([p.grad.clone() for p in scorer.parameters()])
    for a, b in zip(*results, strict=True):  # Cohere's norms round to fp32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=float(1e-6 * b.abs().max()))


def test_a_logit_map_is_read_from_numbers_alone():
    mpt = transformers.MptConfig(logit_scale="inv_sqrt_d_model")
    gemma = transformers.Gemma2Config(final_logit_softcapping=0.0)
    assert logits.logit_map_of(mpt) == logits.logit_map_of(gemma) == LogitMap()
    assert logits.logit_map_of(transformers.Gemma2Config()) == LogitMap(softcap=30.0)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_the_models_own_head_is_used_where_its_config_does_not_say_what_it_does(family, monkeypatch):
    monkeypatch.setattr("dpo.model.forward.logit_map_of", lambda _: LogitMap())
    scorer = Scorer(tiny.model(family))
    settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU)
    assert scorer.own_head
    scorer(collate(tiny.pairs(3), "padded")).sum().backward()
    assert scorer.head.weight.grad.abs().max() > 0


def test_logits_that_the_model_rounds_are_no_reason_to_give_the_fast_head_up(monkeypatch):
    """Logits of GPT-2 lie around -100, where bf16 has steps of a half; nothing of it is in the probabilities."""
    monkeypatch.setattr(products, "fp32_is_faster", lambda: True)  # the fast head has fp32 sums, as on a GPU
    model = tiny.model("gpt2", torch.bfloat16)
    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 10
        output.weight[:, 0] = -10
    pairs = tiny.pairs(3)[1:]
    own = model(input_ids=torch.from_numpy(pairs[0].prompt_ids.astype("int64"))[None]).logits
    assert own.dtype == torch.bfloat16 and -200 < own.max() < -64
    assert settle(Scorer(model), "shared", pairs, 100, CPU) == ("shared", [])


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_head_that_does_more_than_its_config_says_is_seen_in_16_bits_too(family, monkeypatch):
    monkeypatch.setattr(products, "fp32_is_faster", lambda: True)
    monkeypatch.setattr("dpo.model.forward.logit_map_of", lambda _: LogitMap())
    scorer = Scorer(tiny.model(family, torch.bfloat16))
    settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU)
    assert scorer.own_head


def test_what_one_rank_complains_of_no_rank_uses():
    asked = []

    def agree(complaint):
        asked.append(complaint)
        return "the other rank has no such kernel" if len(asked) == 1 else complaint

    scorer = Scorer(tiny.model("llama"))
    layout, notes = settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU, agree=agree)
    assert layout == "padded" and notes == ["layout shared is not used: the other rank has no such kernel"]
    assert asked == [None, None]  # of the kernel, and of the next path


def test_a_model_that_no_path_scores_faithfully_is_refused(monkeypatch):
    monkeypatch.setattr("dpo.model.check.own_logits_logps", lambda *_: torch.zeros(2, dtype=torch.float64))
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be scored faithfully: layout shared is not used: .*"):
        settle(Scorer(tiny.model("llama")), "shared", tiny.pairs(3)[1:], 100, CPU)


def test_a_window_wider_than_every_sequence_is_no_obstacle():
    scorer = Scorer(tiny.model("mistral", sliding_window=100))
    assert settle(scorer, "shared", tiny.pairs(3)[1:], 100, CPU)[0] == "shared"


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, True), (torch.float32, False)])
def test_rounding_of_few_tokens_in_16_bits_is_no_other_model(dtype, allowed):
    scorer = Scorer(tiny.model("llama", dtype))
    pair = TokenizedPair(0, *(np.array(ids, dtype=np.int32) for ids in ([1, 2, 3], [4], [5])))
    use_layout(scorer, "padded")
    with torch.no_grad():
        truth = scorer(collate([pair], "padded"))
    off = _difference(scorer, "padded", [pair], truth + 0.15)
    assert (off <= TOLERANCE[dtype]) == allowed
    many = TokenizedPair(0, *(np.full(n, 7, dtype=np.int32) for n in (3, 30, 30)))
    with torch.no_grad():
        truth = scorer(collate([many], "padded"))
    assert _difference(scorer, "padded", [many], truth + 30 * 0.06) > TOLERANCE[dtype]
