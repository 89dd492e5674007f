"""What losses need of whole next-token distributions, against plain log_softmax over full logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from dpo.data.batch import collate
from dpo.model.check import use_layout
from dpo.model.forward import Scorer, pair_logps
from dpo.model.reference import online_with_tokens
from dpo.model.vocabulary import certainties, token_kls
from dpo.types import FrozenTokens, LogitMap
from tests import tiny

N, H, V = 7, 5, 11


def leaves(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers, shapes = torch.Generator().manual_seed(seed), ((N, H), (V, H), (V,))
    made = [torch.randn(*shape, generator=numbers, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return made[0], made[1], made[2]


def mapped(logits: torch.Tensor, logit_map: LogitMap) -> torch.Tensor:
    logits, cap = logit_map.scale * logits, logit_map.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


MAPS = [LogitMap(), LogitMap(scale=0.25), LogitMap(2.0, 1.5)]


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_kls_and_their_gradient_equal_those_of_full_logits(chunk_rows, logit_map):
    hidden, weight, bias = leaves(0)
    other = LogitMap(softcap=4.0)
    frozen = FrozenTokens(*(x.detach() for x in leaves(1)), other)
    ours = token_kls(hidden, weight, bias, frozen, chunk_rows, logit_map)
    policy = mapped(hidden @ weight.T + bias, logit_map).log_softmax(-1)
    reference = mapped(frozen.hidden @ frozen.weight.T + frozen.bias, other).log_softmax(-1)
    plain = kl_div(policy, reference, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ours, plain)
    assert (ours > 0).all()
    factors = torch.arange(N, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((ours * factors).sum(), (hidden, weight, bias)),
        torch.autograd.grad((plain * factors).sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_certainty_is_the_log_of_the_sum_of_squared_probabilities(chunk_rows, logit_map):
    hidden, weight, bias = leaves(2)
    found = certainties(hidden, weight, bias, chunk_rows, logit_map)
    plain = mapped(hidden @ weight.T + bias, logit_map).softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(found, plain.detach())
    assert not found.requires_grad


@pytest.mark.parametrize(("family", "layout"), [("llama", "shared"), ("llama", "padded"), ("gemma2", "padded")])
def test_a_batch_is_scored_with_kls_certainties_and_weights(family, layout):
    policy, reference = (tiny.model(family, seed=seed) for seed in (0, 1))
    scorer, frozen = Scorer(policy, chunk_rows=4), Scorer(reference)
    for each in (scorer, frozen):
        use_layout(each, layout)
    pairs = tiny.pairs(3, longest=5)
    weights = [(np.full(p.targets[0], 0.5), np.full(p.targets[1], 2.0)) for p in pairs]
    batch = collate(pairs, layout)
    plain = pair_logps(scorer, batch)
    weighted = pair_logps(scorer, collate(pairs, layout, weights), certain=True)
    torch.testing.assert_close(weighted.chosen, 0.5 * plain.chosen)
    torch.testing.assert_close(weighted.rejected, 2.0 * plain.rejected)
    known = online_with_tokens(frozen)(batch)
    torch.testing.assert_close(known.chosen, pair_logps(frozen, batch).chosen)
    with_kls = pair_logps(scorer, batch, known.tokens)
    torch.testing.assert_close(with_kls.chosen, plain.chosen)
    for p, pair in enumerate(pairs):
        for half, (completion, scored) in enumerate(pair.completions):
            ids = torch.from_numpy(np.concatenate((pair.prompt_ids, completion)).astype("int64"))[None]
            answered = np.arange(len(pair.prompt_ids), ids.shape[1])
            rows = (answered if scored is None else answered[scored]) - 1
            with scorer.own_attention(), frozen.own_attention():
                mine, theirs = (m(input_ids=ids).logits[0, rows].log_softmax(-1) for m in (policy, reference))
            kl = kl_div(mine, theirs, log_target=True, reduction="sum")
            assert with_kls.kls[half, p].item() == pytest.approx(kl.item(), rel=1e-6)
            targets = ids[0, rows + 1]
            sure = mine.gather(1, targets[:, None]).squeeze(1) - mine.exp().square().sum(-1).log()
            assert weighted.certainties[half, p].item() == pytest.approx(sure.mean().item(), rel=1e-6)
    assert not weighted.certainties.requires_grad and with_kls.kls.requires_grad


def test_a_policy_that_is_the_reference_has_no_kl():
    scorer = Scorer(tiny.model("llama"))
    use_layout(scorer, "shared")
    batch = collate(tiny.pairs(3), "shared")
    found = pair_logps(scorer, batch, online_with_tokens(scorer)(batch).tokens)
    torch.testing.assert_close(found.kls, torch.zeros_like(found.kls), atol=1e-10, rtol=0)
    assert replace(found, kls=None).kls is None


def test_a_checkpoint_of_before_with_the_embedding_once_more_for_certainties_is_taken_up():
    scorer = Scorer(tiny.model("llama"))
    state = scorer.state_dict() | {"certainty.weight": torch.zeros(3, 2)}
    scorer.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected"):
        scorer.load_state_dict(state | {"certain.weight": torch.zeros(3, 2)}, strict=True)
