"""What is computed otherwise in a model's blocks has the same result, and is computed otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.data.batch import collate
from dpo.model.blocks import checkpoint_activations, compile_blocks, fuse_gelu, spare_last_mlp
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.model.router import balance_of
from dpo.types import PackedBatch
from tests import tiny
from tests.model.test_forward import gradients, scorer_for


def test_fused_gelu_is_gpt2s_own_activation():
    model = tiny.model("gpt2", dtype=torch.float32)
    ids = torch.arange(1, 40)[None]
    before = model(ids).logits
    fuse_gelu(model)
    assert isinstance(model.transformer.h[0].mlp.act, torch.nn.GELU)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_changes_no_gradient_and_recomputes(family):
    pairs = tiny.pairs(4)
    _, truth = gradients(scorer_for(family, "shared", dropout=0.5), pairs, "shared")
    scorer = scorer_for(family, "shared", dropout=0.5)
    checkpoint_activations(scorer.model)
    layers = scorer.model.transformer.h if family == "gpt2" else scorer.model.model.layers
    calls = []
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _, found = gradients(scorer, pairs, "shared")
    assert len(calls) == 2
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-12, atol=1e-12)


def test_recomputed_activations_leave_dropout_off_where_a_layer_has_its_own():
    """OPT's layers ask whether they themselves are in training, and checkpointing needs them to be."""
    config = transformers.OPTConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(1, 13)[None]
    before = model(input_ids=ids).logits
    checkpoint_activations(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


# --- the last MLP ----------------------------------------------------------------------------------------------------


def last_mlp(scorer: Scorer) -> torch.nn.Module:
    return [block for block in scorer.modules() if isinstance(block, GradientCheckpointingLayer)][-1].mlp


def rows_of_the_last_mlp(scorer: Scorer) -> list[int]:
    """Filled with how many rows the last MLP gets, call by call."""
    rows: list[int] = []
    last_mlp(scorer).register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    return rows


def read(batch: PackedBatch) -> int:
    return len(set(batch.score_index.tolist()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_mlp_gets_the_rows_that_predict_alone_and_no_gradient_changes(family):
    """What padded rows give is the truth in test_forward.py too; here it is the same row with the whole MLP."""
    for layout in ("shared", "packed", "chosen"):
        batch, sparing, whole = collate(tiny.pairs(5), layout), scorer_for(family, layout), scorer_for(family, layout)
        whole.model.last_mlp = None
        rows, all_rows = rows_of_the_last_mlp(sparing), rows_of_the_last_mlp(whole)
        logps, found = gradients(sparing, tiny.pairs(5), layout)
        true_logps, truth = gradients(whole, tiny.pairs(5), layout)
        assert rows == [read(batch)] and all_rows == [len(batch.input_ids)] and rows[0] < all_rows[0]
        torch.testing.assert_close(logps, true_logps, rtol=1e-12, atol=1e-12)
        for name in truth:
            torch.testing.assert_close(found[name], truth[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_recomputed_pass_spares_the_last_mlp_the_same_rows():
    scorer, pairs = scorer_for("llama", "shared"), tiny.pairs(5)
    checkpoint_activations(scorer.model)
    rows = rows_of_the_last_mlp(scorer)
    gradients(scorer, pairs, "shared")
    assert rows == 2 * [read(collate(pairs, "shared"))]


def test_the_last_mlp_gets_every_row_where_all_are_read_or_none():
    scorer = scorer_for("llama", "shared")
    rows, batch = rows_of_the_last_mlp(scorer), collate(tiny.pairs(5), "shared")
    with torch.no_grad():
        scorer(batch)
        with scorer.own_attention():
            scorer.model(input_ids=torch.arange(1, 8)[None])
        scorer(collate([], "shared", row_tokens=9))
        use_layout(scorer, "padded")
        scorer(collate(tiny.pairs(2), "padded"))
    assert rows[1:3] == [7, 9] and rows[3] == collate(tiny.pairs(2), "padded").input_ids.numel()


def test_a_router_sees_every_token_where_its_load_is_balanced():
    config = transformers.Qwen3MoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    scorer = Scorer(transformers.AutoModelForCausalLM.from_config(config).eval())
    use_layout(scorer, "packed")
    rows, batch = rows_of_the_last_mlp(scorer), collate(tiny.pairs(5), "packed")
    scorer(batch)
    scorer.balance = balance_of(scorer.model)
    scorer(batch)
    assert rows == [read(batch), len(batch.input_ids)]


def test_a_pass_that_broke_off_leaves_the_next_one_alone():
    scorer, ids = scorer_for("llama", "shared"), torch.arange(1, 8)[None]
    with scorer.own_attention():
        truth = scorer.model(input_ids=ids).logits
    norm = scorer.model.model.layers[-1].post_attention_layernorm
    breaks = norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        scorer(collate(tiny.pairs(5), "shared"))
    breaks.remove()
    with scorer.own_attention():
        torch.testing.assert_close(scorer.model(input_ids=ids).logits, truth)


def test_a_copy_of_a_model_and_a_second_scorer_spare_once():
    model = tiny.model("llama")
    first = scorer_for("llama", "shared")
    copied = Scorer(copy.deepcopy(first.model))
    assert copied.model.last_mlp is not first.model.last_mlp
    rows, of_first, batch = rows_of_the_last_mlp(copied), rows_of_the_last_mlp(first), collate(tiny.pairs(5), "shared")
    with torch.no_grad():
        torch.testing.assert_close(copied(batch), first(batch), rtol=0, atol=0)
    assert rows == of_first == [read(batch)]
    hooks = len(last_mlp(copied)._forward_hooks)
    spare_last_mlp(model)
    spare_last_mlp(copied.model)
    assert len(last_mlp(copied)._forward_hooks) == hooks


def test_an_mlp_of_more_than_hidden_states_is_left_as_it_is():
    class Attention(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            return hidden

    class Two(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return hidden + residual

    class Block(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = Attention(), Two()

        def forward(self, hidden: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.attention(hidden, **kwargs), hidden)

    model = torch.nn.Sequential(Block())
    spare_last_mlp(model)
    hidden = torch.ones(1, 3, 2)
    assert torch.equal(model[0](hidden, predicting=torch.tensor([1])), 2 * hidden)


def test_compiled_blocks_are_asked_for_every_row():
    """test_attention.py shows that they compile once."""
    scorer = scorer_for("llama", "shared")
    assert scorer.model.last_mlp is not None
    compile_blocks(scorer.model, "eager")
    assert scorer.model.last_mlp is None
