"""The families that docs/performance.md names take the layout that is stated, each as a random model of two layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dpo.model.check import settle
from dpo.model.forward import Scorer
from tests import tiny

PAGE = (Path(__file__).resolve().parents[2] / "docs/performance.md").read_text(encoding="utf-8").split("## Models")[1]
TABLE = re.findall(r"^\| (shared|padded)\b[^|]* \| (.*) \|$", PAGE.split("\n## ")[0], re.MULTILINE)
NAMED = [(family, layout) for layout, cell in TABLE for family in re.findall(r"`(\w+)`", cell)]
COMMON: dict[str, Any] = dict(
    vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    pad_token_id=None,
)  # fmt: skip
EXPERTS = {"num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}  # fmt: skip
ROTARY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}
HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": ROTARY, "gptj": ROTARY, "codegen": ROTARY, "bloom": ROTARY, "mpt": {"d_model": 32, "n_heads": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "mamba": {"state_size": 4}, "phi3": {"pad_token_id": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    "deepseek_v3": EXPERTS | {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "glm4_moe": EXPERTS | HEADS, "qwen3_moe": EXPERTS | HEADS, "gpt_oss": EXPERTS | HEADS,
} | {name: EXPERTS for name in ("mixtral", "qwen2_moe", "olmoe")} | {
    name: HEADS for name in ("gemma", "gemma2", "gemma3_text", "qwen3", "glm", "glm4", "nemotron", "seed_oss", "helium",
                             "ernie4_5", "hunyuan_v1_dense")
}  # fmt: skip


def test_the_page_names_families():
    assert len(NAMED) > 40 and len({family for family, _ in NAMED}) == len(NAMED)


@pytest.mark.parametrize(("family", "layout"), NAMED)
def test_a_family_takes_the_layout_that_is_stated(family, layout):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **COMMON | SIZES.get(family, {}))
    scorer = Scorer(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    found, why = settle(scorer, "shared", tiny.pairs(4)[1:], 60, torch.device("cpu"))
    assert (found, bool(why)) == (layout, layout == "padded"), why
    assert not scorer.own_head
