"""The load-balancing loss of a mixture of experts is the one that the model's own code computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import dpo.train
import train_dpo
from dpo.config import LoraConfig
from dpo.data.batch import collate
from dpo.errors import UserError
from dpo.model import adapters
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.model.router import balance_of, coefficient
from dpo.runtime.tracking import read_lines
from dpo.types import TokenizedPair
from tests import tiny
from tests.data.tiny_tokenizers import plain_rows, tokenizer_of, written


def moe(family: str, vocab_size: int = tiny.VOCAB, **changes: Any) -> Any:
    """A 2-layer mixture of 4 experts, 2 of them for every token."""
    torch.manual_seed(0)
    common: dict[str, Any] = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
        pad_token_id=None, num_experts_per_tok=2, router_aux_loss_coef=0.05,
    )
    if family == "mixtral":
        config: Any = transformers.MixtralConfig(**common, num_local_experts=4, **changes)
    else:
        config = transformers.Qwen2MoeConfig(
            **common, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **changes
        )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_value_and_gradient_are_those_of_the_models_own_code_on_the_padded_batch(family):
    model, pairs = moe(family), tiny.pairs(3)
    scorer = Scorer(model)
    use_layout(scorer, "packed")
    scorer.balance = balance_of(model)
    scorer(collate(pairs, "packed"))
    assert scorer.router_loss is not None
    gates = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    found = torch.autograd.grad(scorer.router_loss, gates)

    use_layout(scorer, "padded")
    padded = collate(pairs, "padded")
    ids = padded.input_ids.view(padded.num_rows, -1)
    lengths = [len(p.prompt_ids) + len(getattr(p, side)) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    own = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(scorer.router_loss, own, rtol=1e-5, atol=1e-6)
    assert len(gates) == 2
    for expected, value in zip(torch.autograd.grad(own, gates), found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_without_gradient_no_router_is_asked():
    model = moe("mixtral")
    scorer = Scorer(model)
    use_layout(scorer, "packed")
    scorer.balance = balance_of(model)
    with torch.no_grad():
        scorer(collate(tiny.pairs(2), "packed"))
    assert scorer.router_loss is None


def test_the_coefficient_is_the_configs_only_where_it_asks_for_router_logits():
    assert coefficient(moe("mixtral"), None) == 0
    assert coefficient(moe("mixtral", output_router_logits=True), None) == 0.05
    assert coefficient(moe("mixtral", output_router_logits=True), 0.0) == 0
    assert coefficient(moe("mixtral"), 0.5) == 0.5
    assert coefficient(tiny.model("llama"), None) == 0
    with pytest.raises(UserError, match="loss.router_aux_coef is 0.5 and LlamaForCausalLM has no load-balancing loss"):
        coefficient(tiny.model("llama"), 0.5)


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The folder of a Mixtral that asks for router logits."""
    folder, tokenizer = tmp_path_factory.mktemp("moe"), tokenizer_of("byte")
    tokenizer.save_pretrained(folder)
    moe("mixtral", vocab_size=len(tokenizer), output_router_logits=True).save_pretrained(folder)
    return folder


def run(folder: Path, start: Path, *flags: str, rows: list[dict[str, str]] | None = None) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    argv = [
        "--model.policy", str(start), "--data.train", str(written(folder, rows or plain_rows(8))), "--data.cache_dir",
        str(folder / "cache"), "--train.global_batch_size", "8", "--train.max_steps", "1", "--optim.lr", "1e-3",
        "--optim.warmup_steps", "0", "--optim.max_grad_norm", "0", "--log.samples", "0",
        "--train.output_dir", str(folder / "run"), *flags,
    ]  # fmt: skip
    assert train_dpo.main(argv) == 0
    return [line for line in read_lines(folder / "run") if "loss" in line]


@pytest.mark.parametrize("flags", [[], ["--model.gradient_checkpointing", "true"]], ids=["kept", "recomputed"])
def test_a_step_adds_the_weighted_loss_to_the_gradient(flags, start, tmp_path, monkeypatch, capsys):
    seen: list[Any] = []
    original = dpo.train.start_models

    def watched(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(dpo.train, "start_models", watched)
    with_router, without = run(tmp_path / "a", start, *flags), run(tmp_path / "b", start, "--loss.router_aux_coef", "0")
    assert with_router[0]["loss"] == pytest.approx(without[0]["loss"], abs=1e-5)  # the objective alone is shown
    assert "router: load-balancing loss x 0.05 on every micro-batch; layout packed" in capsys.readouterr().err
    assert seen[0][0].layout == "packed" and seen[1][0].layout == "shared"
    # By hand: the gradient norm of objective + 0.05 x the model's own auxiliary loss on all pairs at once.
    fresh = transformers.AutoModelForCausalLM.from_pretrained(start).eval()
    scorer = Scorer(fresh)
    use_layout(scorer, "packed")
    scorer.balance = balance_of(fresh)
    batch = collate(pairs_of(plain_rows(8)), "packed")
    chosen, rejected = scorer(batch).tensor_split(2)
    before = (chosen - rejected).detach()
    objective = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected - before)).mean()
    assert scorer.router_loss is not None
    (objective + 0.05 * scorer.router_loss).backward()
    norm = torch.stack([p.grad.norm() for p in fresh.parameters() if p.grad is not None]).norm()
    assert with_router[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert abs(without[0]["grad_norm"] - float(norm)) > 1e-3 * float(norm)
    # Shown beside the objective, unweighted; not where it is switched off.
    assert with_router[0]["aux_loss"] == pytest.approx(float(scorer.router_loss.detach()), rel=1e-5)
    assert "aux_loss" not in without[0]


def test_micro_batches_count_with_their_share_of_the_pairs(start, tmp_path):
    # Equal pairs, so that every micro-batch has the same load-balancing loss as all of them together.
    rows = [plain_rows(3)[2]] * 8
    whole, parts = (
        run(tmp_path / size, start, "--train.micro_batch_size", size, rows=rows)[0] for size in ("8", "2")
    )
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert parts["aux_loss"] == pytest.approx(whole["aux_loss"], rel=1e-5)


def pairs_of(rows: list[dict[str, str]]) -> list[TokenizedPair]:
    """Pairs as the rows say: the byte tokenizer knows no merges across the boundary."""
    tokenizer = tokenizer_of("byte")

    def ids(text: str) -> Any:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return [
        TokenizedPair(i, ids(row["prompt"]), np.concatenate([ids(row["chosen"]), end]),
                      np.concatenate([ids(row["rejected"]), end]))
        for i, row in enumerate(rows)
    ]  # fmt: skip


def test_a_negative_coefficient_is_refused(start, tmp_path, capsys):
    argv = ["--model.policy", str(start), "--data.train", "builtin:world", "--loss.router_aux_coef", "-1"]
    assert train_dpo.main([*argv, "--train.output_dir", str(tmp_path / "run")]) == 2
    assert "loss.router_aux_coef is -1.0; use a number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_by_default_no_router_and_no_expert_gets_an_adapter(family):
    """Experts stand in one tensor, and an adapter on it would be added to all of them in every forward pass."""
    model = moe(family)
    adapters.add(model, LoraConfig(r=2), seed=0, base="")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    attention = {name.split(".")[4] for name in trained if "self_attn" in name}
    assert attention == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not [name for name in trained if ".experts." in name or ".gate." in name or "lm_head" in name]


class Odd(torch.nn.Module):
    """Layers whose last names are numbers, as that of a block is, and a router that is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())])
        self.router = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)})
        self.lm_head = torch.nn.Linear(2, 2)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head


def test_layers_are_named_whole_where_their_last_names_mean_others():
    assert adapters.linear_names(Odd()) == ["layers.0.0"]
    assert adapters.linear_names(tiny.model("gpt2")) == ["c_attn", "c_fc", "c_proj"]
