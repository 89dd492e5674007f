"""The boundary: prompt ids + completion ids spell prompt + completion, with one BOS at most and one end token."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from dpo.data.boundary import TextEncoder, encode_prompt
from dpo.data.chat import end_ids
from dpo.data.encode import PairEncoder
from dpo.errors import UserError
from dpo.types import PreferenceRow
from tests.data.tiny_tokenizers import CHATML, chat, end_of, text_of, tokenizer_of, with_template

PROMPTS = ["\n\nHuman: Hi\n\nAssistant:", "Once upon a time", "ends with space ", "x\n", "\u00e9\u4e16\u754c"]
COMPLETIONS = [" Yes, I do.", "No", "\n\nlist:\n - a\n", "  two spaces", "\u4e16\u754c!", "\n", "s", "1 = 2 : a"]


def encoded(tokenizer: Any, prompt: Any, chosen: Any, rejected: Any = "other", **options: Any) -> Any:
    if not isinstance(prompt, str) and rejected == "other":
        rejected = [{"role": "assistant", "content": "other"}]
    options = {"max_length": 10_000} | options
    return PairEncoder(tokenizer, **options).encode_rows([PreferenceRow(prompt, chosen, rejected, 1)])[0]


@pytest.fixture(params=["byte", "byte with BOS", "pieces", "gpt2-tokenizer", "stories260k-llama"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "byte with BOS":
        return tokenizer_of("byte", around="<s> $A")
    if request.param in ("byte", "pieces"):
        return tokenizer_of(request.param)
    folder = request.getfixturevalue("shared_data") / request.param
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_prompt_and_completion_ids_decode_to_the_text(tokenizer: Any) -> None:
    for prompt in PROMPTS:
        for completion in COMPLETIONS:
            pair = encoded(tokenizer, prompt, completion, "Nothing")
            assert pair.prompt_ids == tokenizer(prompt)["input_ids"] == encode_prompt(tokenizer, prompt)
            assert pair.chosen_ids[-1] == tokenizer.eos_token_id
            assert text_of(tokenizer, pair.prompt_ids + pair.chosen_ids) == prompt + completion


def test_encoding_the_two_apart_would_add_a_space() -> None:
    tokenizer = tokenizer_of("pieces")
    apart = tokenizer("Hi")["input_ids"] + tokenizer("Yes", add_special_tokens=False)["input_ids"]
    assert text_of(tokenizer, apart) == "Hi Yes"
    pair = encoded(tokenizer, "Hi", "Yes")
    assert text_of(tokenizer, pair.prompt_ids + pair.chosen_ids) == "HiYes"


def test_a_completion_that_merges_with_the_anchor_is_encoded_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("pieces")
    encoder = TextEncoder(tokenizer)
    encoder._anchor = " "  # merges with what begins with H or a
    assert tokenizer.decode(encoder.encode_completions(["Hi"])[0]) == "Hi"
    monkeypatch.setattr("dpo.data.boundary._ANCHORS", ("",))
    with pytest.raises(UserError, match="cannot encode this completion by itself: 'Hi'"):
        encoder.encode_completions(["Hi"])


def test_a_tokenizer_that_cannot_encode_a_completion_by_itself_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"?": 0, "Hello": 1, "Assistant:": 2, "a": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # a word at the boundary is another word
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?")
    with pytest.raises(UserError, match="cannot encode a completion apart from its prompt"):
        TextEncoder(tokenizer).encode_completions(["x"])


def test_a_bos_stands_once_and_an_eos_never_in_a_prompt() -> None:
    tokenizer = tokenizer_of("pieces", around="<s> $A </s>")
    bos, eos = end_of(tokenizer, "<s>"), end_of(tokenizer)
    assert tokenizer("Hi")["input_ids"][-1] == eos
    expected = tokenizer("Hi")["input_ids"][:-1]
    for prompt in ("Hi", "<s>Hi", "<s><s>Hi"):
        assert encode_prompt(tokenizer, prompt) == expected and expected.count(bos) == 1
        pair = encoded(tokenizer, prompt, " Yes")
        assert (pair.prompt_ids + pair.chosen_ids).count(bos) == (pair.prompt_ids + pair.chosen_ids).count(eos) == 1


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = tokenizer_of("byte", bos_token=None)
    assert encode_prompt(tokenizer, "Hi") == tokenizer("Hi")["input_ids"] and len(encode_prompt(tokenizer, "Hi")) == 2


def test_a_completion_ends_with_one_eos_even_if_the_text_has_one() -> None:
    tokenizer = tokenizer_of("byte")
    expected = encoded(tokenizer, "Hi", " Yes").chosen_ids
    assert expected.count(end_of(tokenizer)) == 1 and expected[-1] == end_of(tokenizer)
    for text in (" Yes</s>", " Yes</s></s>"):
        assert encoded(tokenizer, "Hi", text).chosen_ids == expected


def test_end_tokens_within_a_completion_make_a_bad_row() -> None:
    tokenizer = tokenizer_of("byte")
    assert encoded(tokenizer, "Hi", "a</s>b").problems[0].kind == "completion holds the end token"
    assert encoded(tokenizer, "Hi", "</s>").problems[0].kind == "empty response"
    answer = [{"role": "assistant", "content": "a<|im_end|>b"}]
    pair = encoded(with_template(tokenizer, CHATML), chat("Hi"), answer)
    assert pair.problems[0].kind == "completion holds the end token"


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        encoded(tokenizer_of("byte", eos_token=None, pad_token=None), "Hi", "Yes")


def test_answers_end_with_eos_and_with_the_end_of_turn_of_a_template():
    """A base model's EOS is often not what the template ends a turn with."""
    tokenizer = tokenizer_of("byte")
    eos = tokenizer.eos_token_id
    assert end_ids(tokenizer) == [eos]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    assert end_ids(tokenizer) == [eos, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert end_ids(tokenizer) == [eos]
