"""Encoding: conversations end as their template ends them, and pairs are cut to length from the right side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo.data.boundary import encode_prompt
from dpo.data.chat import read_chat_template
from dpo.data.encode import PairEncoder
from dpo.errors import UserError
from dpo.types import PreferenceRow
from tests.data.tiny_tokenizers import (
    CHATML,
    NO_END,
    OTHER_START,
    WITH_BOS_AND_EOS,
    chat,
    end_of,
    tokenizer_of,
    with_template,
)


def encoded(tokenizer: Any, prompt: Any, chosen: Any, rejected: Any = "other", **options: Any) -> Any:
    if not isinstance(prompt, str) and rejected == "other":
        rejected = [{"role": "assistant", "content": "other"}]
    options = {"max_length": 10_000} | options
    return PairEncoder(tokenizer, **options).encode_rows([PreferenceRow(prompt, chosen, rejected, 1)])[0]


def cuts(pair: Any) -> list[str]:
    return [note.kind for note in pair.notes if "max_length" in note.kind]


@pytest.mark.parametrize("kind", ["byte", "pieces"])
@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        (CHATML, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", " Yes <|im_end|>"),
        (WITH_BOS_AND_EOS, "<s>[INST] Hi [/INST]", " Yes </s>"),
    ],
)
def test_an_answer_ends_with_the_templates_own_token(kind: str, template: str, prompt: str, completion: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = template
    pair = encoded(tokenizer, chat("Hi"), [{"role": "assistant", "content": " Yes "}])
    assert tokenizer.decode(pair.chosen_ids).lstrip() == completion.lstrip()
    own = tokenizer.apply_chat_template(chat("Hi"), add_generation_prompt=True, return_dict=False)
    assert pair.prompt_ids == own == encode_prompt(tokenizer, chat("Hi"))
    assert pair.prompt_ids.count(end_of(tokenizer, "<s>")) == prompt.count("<s>")
    assert pair.chosen_ids[-1] == end_of(tokenizer, "<|im_end|>" if "im_end" in template else "</s>")
    if kind == "byte":
        assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == prompt + completion


def test_several_turns_are_rendered_as_one_conversation() -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = CHATML
    pair = encoded(tokenizer, chat("a", "b", "c"), [{"role": "assistant", "content": "d"}])
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    start = turn.format("user", "a") + turn.format("assistant", "b") + turn.format("user", "c")
    assert tokenizer.decode(pair.prompt_ids) == start + "<|im_start|>assistant\n"
    assert tokenizer.decode(pair.chosen_ids) == "d<|im_end|>"


def test_conversations_without_a_template_name_the_setting() -> None:
    with pytest.raises(UserError, match="no chat template: give one with model.chat_template"):
        encoded(tokenizer_of("byte"), chat("Hi"), chat("", "Yes")[1:])
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer_of("byte"), chat("Hi"))


def test_a_template_that_cannot_be_trained_on_is_refused() -> None:
    reasons = "no end-of-turn token after an answer but '.*', in which", "another beginning before an answer"
    for template, reason in zip((NO_END, OTHER_START), reasons, strict=True):
        with pytest.raises(UserError, match=f"{reason}.*model.chat_template"):
            encoded(with_template(tokenizer_of("byte"), template), chat("Hi"), chat("", "Yes")[1:])


def test_a_conversation_the_template_refuses_is_a_bad_row() -> None:
    tokenizer = with_template(tokenizer_of("byte"), WITH_BOS_AND_EOS)
    system = [{"role": "system", "content": "x"}, *chat("Hi")]
    pair = encoded(tokenizer, system, chat("", "Yes")[1:])
    assert pair.problems[0].kind == "chat template does not fit" and "no system role" in pair.problems[0].detail
    with pytest.raises(UserError, match="refuses a conversation: no system role"):
        encode_prompt(tokenizer, system)
    first = CHATML.replace("{% for", "{% if messages|length == 4 %}!{% endif %}{% for", 1)
    last = CHATML + "{% if messages|length == 4 %}!{% endif %}"
    for template, reason in ((first, "does not start with its rendered prompt"), (last, "does not end as other")):
        pair = encoded(with_template(tokenizer, template), chat("a", "b", "c"), chat("", "Yes")[1:])
        assert reason in pair.problems[0].detail


def test_a_template_is_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert read_chat_template(CHATML) == read_chat_template(str(tmp_path / "chat.jinja")) == CHATML
    with pytest.raises(UserError, match="model.chat_template 'absent.jinja': neither template text nor"):
        read_chat_template("absent.jinja")


def test_completions_lose_their_end_where_the_pair_is_too_long() -> None:
    tokenizer = tokenizer_of("byte")
    pair = encoded(tokenizer, "12345", "abcdefgh", "ab", max_length=10)
    assert tokenizer.decode(pair.prompt_ids) == "12345" and tokenizer.decode(pair.chosen_ids) == "abcde"
    assert tokenizer.decode(pair.rejected_ids) == "ab</s>" and pair.completions_cut == 1
    assert cuts(pair) == ["longer than max_length"] and not pair.problems


def test_the_end_token_counts_and_a_pair_that_fits_is_whole() -> None:
    tokenizer = tokenizer_of("byte")
    for max_length, cut in ((9, 0), (8, 1)):
        pair = encoded(tokenizer, "12345", "abc", "a", max_length=max_length, max_prompt_length=None)
        assert pair.completions_cut == cut == len(cuts(pair))
    pair = encoded(tokenizer, "12345", "abc", "a", max_length=9, max_prompt_length=2)
    assert tokenizer.decode(pair.prompt_ids) == "12345" and not pair.prompt_cut and not cuts(pair)


def test_prompts_lose_their_start_first_but_no_more_than_is_needed() -> None:
    tokenizer = tokenizer_of("byte")
    pair = encoded(tokenizer, "123456", "abc", "a", max_length=9, max_prompt_length=2)
    assert tokenizer.decode(pair.prompt_ids) == "23456" and pair.prompt_cut and not pair.completions_cut
    pair = encoded(tokenizer, "123456", "abcdefgh", "a", max_length=9, max_prompt_length=4)
    assert tokenizer.decode(pair.prompt_ids) == "3456" and tokenizer.decode(pair.chosen_ids) == "abcde"
    pair = encoded(tokenizer, "1" * 20, "abc", "a", max_length=9, max_prompt_length=4)
    assert not pair.problems and cuts(pair) == ["longer than max_length", "prompt alone max_length or more"]
    assert len(pair.prompt_ids) == 5 and tokenizer.decode(pair.chosen_ids) == "abc</s>"


def test_a_bos_stays_when_its_prompt_is_cut() -> None:
    tokenizer = tokenizer_of("pieces")
    pair = encoded(tokenizer, "sssshi", "nnnnnnnn", "n", max_length=6, max_prompt_length=3)
    assert tokenizer.convert_ids_to_tokens(pair.prompt_ids) == ["<s>", "h", "i"]
    pair = encoded(tokenizer, "sssshi", "nnnnnnnn", "n", max_length=6, max_prompt_length=1)
    assert tokenizer.convert_ids_to_tokens(pair.prompt_ids) == ["i"]


def test_a_prompt_that_leaves_no_room_is_bad() -> None:
    tokenizer = tokenizer_of("byte")
    for length, bad in ((8, True), (9, False)):
        pair = encoded(tokenizer, "12345678", "abc", "b", max_length=length)
        assert [problem.kind for problem in pair.problems] == ["prompt alone max_length or more"] * bad
        assert bad or (len(pair.chosen_ids) == len(pair.rejected_ids) == 1)


def test_completions_that_differ_beyond_the_cut_alone_are_bad() -> None:
    pair = encoded(tokenizer_of("byte"), "12345", "abcdefgh", "abcdefgx", max_length=10)
    assert [problem.kind for problem in pair.problems] == ["chosen == rejected after truncation"]
    assert not encoded(tokenizer_of("byte"), "12345", "abcdefgh", "abcdxfgh", max_length=10).problems


def test_completions_with_the_same_tokens_are_equal_whatever_their_text() -> None:
    trimmed = CHATML.replace("m.content", "m.content | trim")
    answers = ([{"role": "assistant", "content": text}] for text in ("Yes.", "Yes. \n"))
    for prompt, chosen, rejected in (("Hi", "Yes", "Yes</s>"), (chat("Hi"), *answers)):
        pair = encoded(with_template(tokenizer_of("byte"), trimmed), prompt, chosen, rejected)
        assert [problem.kind for problem in pair.problems] == ["chosen == rejected"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"), "the role tool"),
        (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"), "the role system"),
        (CHATML, "leaves out the tools"),
        (CHATML + "{% if tools %}{% endif %}", "leaves out the tools"),
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML, None),
        ("{% if tools %}T{% endif %}" + CHATML.replace("m.content", "(m.content | tojson)"), None),
    ],
)
def test_a_template_that_leaves_out_a_part_of_the_prompt_makes_a_bad_row(template: str, reason: str | None) -> None:
    tokenizer = tokenizer_of("byte")
    told = [{"role": "system", "content": "Be \"brief\""}, *chat("3?", "calc"), {"role": "tool", "content": '"\n3"'}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes", "No")]
    row = PreferenceRow(told, *answers, 1, tools=[{"name": "calc"}])
    (pair,) = PairEncoder(with_template(tokenizer, template), max_length=999).encode_rows([row])
    found = [(problem.kind, problem.detail) for problem in pair.problems]
    assert [kind for kind, _ in found] == (["chat template does not fit"] if reason else [])
    assert reason is None or reason in found[0][1]


@pytest.mark.parametrize("kind", ["byte", "pieces"])
@pytest.mark.parametrize("after", ["", "\n", ":"])
def test_an_answer_begins_with_the_token_that_it_has_behind_its_prompt(kind: str, after: str) -> None:
    template = CHATML.replace("<|im_start|>{{ m.role }}\n", "<|im_start|>" + after).replace("assistant\n", after)
    tokenizer = with_template(tokenizer_of(kind), template)
    prompt, texts = chat("Hi"), ("Hi", " hi", "a", "\nhi", "1")
    for text in texts:
        pair = encoded(tokenizer, prompt, [{"role": "assistant", "content": text}])
        whole = tokenizer("<|im_start|>Hi<|im_end|>\n<|im_start|>".replace("t|>Hi", f"t|>{after}Hi") + after + text)
        ids = whole["input_ids"]
        ids = ids[ids[0] == tokenizer.bos_token_id :]  # a template writes its own
        assert pair.prompt_ids + pair.chosen_ids == [*ids, end_of(tokenizer, "<|im_end|>")]


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="data.max_length 1: must be 2 or more"):
        PairEncoder(tokenizer_of("byte"), max_length=1)
    for limit in (0, 8):
        with pytest.raises(UserError, match=f"data.max_prompt_length {limit}: must be at least 1 and less than"):
            PairEncoder(tokenizer_of("byte"), max_length=8, max_prompt_length=limit)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "kind"),
    [
        ("Answer: ", "4", "5", "prompt ends with a space"),
        ("two", "plus", " minus", "prompt and completion run together"),
        ("Answer:", " 4", "5", "only one completion begins with white space"),
        ("Answer:", " 4", " 5", None),
        ("Answer:\n", "4", "5", None),
    ],
)
def test_what_is_odd_where_prompt_and_completion_meet_is_noted(
    prompt: str, chosen: str, rejected: str, kind: str | None
) -> None:
    pair = encoded(tokenizer_of("byte"), prompt, chosen, rejected)
    expected = {kind} if kind else set()
    if kind == "prompt and completion run together":
        expected.add("only one completion begins with white space")
    assert {note.kind for note in pair.notes} == expected and not pair.problems


def test_tokens_that_merge_over_the_boundary_are_noted() -> None:
    tokenizer = tokenizer_of("pieces")  # has a token for "_H" and none for two characters within a word
    assert tokenizer.tokenize("o Ho")[-2:] == ["\u2581H", "o"]
    for prompt, completion, merges in (("o ", "Ho", True), ("o", " Ho", False), ("oH", "o", False)):
        kinds = {note.kind for note in encoded(tokenizer, prompt, completion, completion + "o").notes}
        assert ("prompt and completion merge if encoded together" in kinds) == merges, prompt


TOOLS_AND_THOUGHTS = (
    "{{ mood }} {% if tools %}<|im_start|>system\n"
    "{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}call {{ m.tool_calls[0].function.name }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if mood and not add_generation_prompt %}{{ mood }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_a_row_brings_its_tools_and_template_arguments() -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = TOOLS_AND_THOUGHTS
    call: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    ]
    row = PreferenceRow(chat("Hi"), call, chat("Hi", "No")[1:], 1, None, [TOOL], {"mood": "glad"})
    plain = PreferenceRow(chat("Hi"), call, chat("Hi", "No")[1:], 2)
    encoder = PairEncoder(tokenizer, max_length=1000, chat_template_kwargs={"mood": "sad"})
    with_tools, without = encoder.encode_rows([row, plain])
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(with_tools.prompt_ids) == "glad <|im_start|>system\nweather <|im_end|>\n" + start
    assert tokenizer.decode(without.prompt_ids) == "sad " + start  # the setting, where the row says nothing
    # What either mood makes the template write behind the last turn is no part of the answer.
    for pair in (with_tools, without):
        assert tokenizer.decode(pair.chosen_ids) == "call weather<|im_end|>" and not pair.problems
    own = tokenizer.apply_chat_template(
        chat("Hi"), tools=[TOOL], mood="glad", add_generation_prompt=True, return_dict=False
    )
    assert with_tools.prompt_ids == own == encode_prompt(
        tokenizer, chat("Hi"), template_options={"tools": [TOOL], "mood": "glad"}
    )


def test_plain_rows_and_conversations_may_alternate() -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = CHATML
    rows = [
        PreferenceRow("Q:", " a", " b", 1),
        PreferenceRow(chat("Q"), chat("Q", "a")[1:], chat("Q", "b")[1:], 2),
        PreferenceRow("R:", " a", " b", 3),
    ]
    together = PairEncoder(tokenizer, max_length=100).encode_rows(rows)
    alone = [PairEncoder(tokenizer, max_length=100).encode_rows([row])[0] for row in rows]
    assert together == alone and tokenizer.decode(together[2].prompt_ids) == "R:"
