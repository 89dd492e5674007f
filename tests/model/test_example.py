"""The built-in tokenizer loses nothing and the built-in policy is the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data.example import rows, slot_values
from dpo.model.example import CONTEXT, EOS_TOKEN, build_model, build_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "\n\nHuman:\n\nAssistant:",
    "\tTab\r\nCRLF\u0000null\u007f",
    "na\u00efve caf\u00e9 \u2014 \u20ac",
    "e\u0301 is not \u00e9",
    "\u65e5\u672c\u8a9e\u3000\u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f680 \U0001f1e6\U0001f1f7",
    "\ufeffBOM \u200b \u00a0 \u2028",
    "Tea pot teapot Teapotteapot  teapot",
    "do n't , . ! ' s",
    "the theatre, Themira.",
    " 171 0171 99999",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_decodes_back_exactly(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_world_rows_decode_back_exactly_and_fit_the_context() -> None:
    tokenizer = build_tokenizer()
    for row in rows("validation"):
        ids = tokenizer(row["chosen"]).input_ids
        assert tokenizer.decode(ids) == row["chosen"]
        assert len(ids) < CONTEXT // 4


def test_prompt_and_completion_encoded_apart_equal_the_whole() -> None:
    tokenizer = build_tokenizer()
    for row in rows("validation"):
        boundary = row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")
        prompt, completion = row["chosen"][:boundary], row["chosen"][boundary:]
        assert tokenizer(prompt).input_ids + tokenizer(completion).input_ids == tokenizer(row["chosen"]).input_ids


@pytest.mark.parametrize("held_out", [False, True])
def test_every_slot_value_is_two_tokens(held_out: bool) -> None:
    tokenizer = build_tokenizer()
    for values in slot_values(held_out).values():
        assert {len(tokenizer(f" {value}").input_ids) for value in values} == {2}


def test_heldout_rows_use_only_tokens_that_training_rows_use() -> None:
    tokenizer = build_tokenizer()
    seen = {
        split: {token for row in rows(split) for token in tokenizer(row["chosen"]).input_ids}
        for split in ("train", "validation")
    }
    assert seen["validation"] <= seen["train"]


def test_tokenizer_adds_no_token_and_its_end_token_is_one() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer("").input_ids == []
    assert tokenizer.pad_token_id is None and tokenizer.bos_token_id is None
    assert tokenizer(EOS_TOKEN).input_ids == [tokenizer.eos_token_id] == [0]


def test_tokenizer_is_the_same_every_time() -> None:
    assert build_tokenizer().backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()


def test_same_seed_same_weights_and_another_seed_others() -> None:
    first, again, other = (build_model(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_building_a_model_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_model(5)
    assert torch.equal(before, torch.get_rng_state())


def test_model_is_fp32_tied_without_dropout_and_fits_the_tokenizer() -> None:
    model = build_model(0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.attention_dropout == 0.0
    assert model.config.vocab_size == len(build_tokenizer())
    assert model.config.eos_token_id == build_tokenizer().eos_token_id
    assert model.config.max_position_embeddings >= 256


def test_saved_folder_loads_as_any_other_and_computes_the_same(tmp_path: Path) -> None:
    build_model(1).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    for text in [*ODD_TEXTS, rows("validation")[0]["chosen"]]:
        assert tokenizer(text).input_ids == build_tokenizer()(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = torch.tensor([tokenizer(rows("validation")[0]["chosen"]).input_ids])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, build_model(1)(input_ids=ids).logits)
