"""Formats: each schema gives the same preference, and every oddity of a row is named by its kind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dpo.data.formats import convert, detect_format
from dpo.data.kinds import NOT_TEXT, Problem, content_of
from dpo.errors import UserError
from dpo.types import PreferenceRow

HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
PLAIN = {"prompt": "Hi", "chosen": " Yes", "rejected": " No"}
USER = {"role": "user", "content": "Hi"}
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}
SYSTEM = {"role": "system", "content": "Be brief"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "explicit, prompt repeated": {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "implicit": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "UltraFeedback-binarized": {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 1.0},
    "prompt string": {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
    "answer strings": {"prompt": [USER], "chosen": "Yes", "rejected": "No"},
    "JSON text": {"prompt": json.dumps([USER]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
    "JSON text beside lists": {"prompt": [USER], "chosen": json.dumps([YES]), "rejected": [NO]},
    "roles in capitals": {
        "prompt": [USER | {"role": "User"}], "chosen": [YES | {"role": "ASSISTANT"}], "rejected": [NO],
    },
    "parts of text": {
        "prompt": [USER], "rejected": [NO],
        "chosen": [YES | {"content": [{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]}],
    },
    "single messages": {"prompt": [USER], "chosen": YES, "rejected": NO},
    "Intel/orca_dpo_pairs": {"system": "", "question": "Hi", "chosen": "Yes", "rejected": "No"},
    "Alpaca": {"instruction": "Hi", "input": "", "chosen": "Yes", "rejected": "No"},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yes"},
        "rejected": {"from": "gpt", "value": "No"},
    },
}


def kinds(row: dict[str, Any], form: str) -> set[str]:
    return {problem.kind for problem in convert(row, form, 1)[1]}


def test_hh_transcripts_are_split_at_the_last_assistant_turn() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row, problems = convert({"chosen": start + " d", "rejected": start + " e\nf"}, "hh", 7)
    assert row == PreferenceRow(prompt=start, chosen=" d", rejected=" e\nf", row=7) and problems == []


def test_plain_strings_are_taken_as_they_are() -> None:
    assert convert(PLAIN, "prompt", 3) == (PreferenceRow("Hi", " Yes", " No", 3), [])


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_every_form_of_conversation_gives_the_same_preference(form: str) -> None:
    assert detect_format([CONVERSATIONS[form]]) == "conversation"
    assert convert(CONVERSATIONS[form], "conversation", 1) == (PreferenceRow([USER], [YES], [NO], 1), [])


def test_implicit_prompts_keep_the_system_message_and_earlier_turns() -> None:
    start = [SYSTEM, USER, YES, USER]
    row, problems = convert({"prompt": "Hi", "chosen": [*start, YES], "rejected": [*start, NO]}, "conversation", 1)
    assert row == PreferenceRow(start, [YES], [NO], 1) and not problems
    row, _ = convert({"prompt": [USER], "system": "Be brief", "chosen": [YES], "rejected": [NO]}, "conversation", 1)
    assert row and row.prompt == [SYSTEM, USER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"question": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, YES], "rejected": [SYSTEM, USER, NO]},
        {"prompt": [USER], "chosen": [SYSTEM, USER, YES], "rejected": [YES | {"content": "No"}]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ],
)
def test_a_column_system_goes_before_the_prompt_however_the_rest_is_written(row: dict[str, Any]) -> None:
    row = {"system": "Be brief", **row}
    assert detect_format([row]) == "conversation"
    assert convert(row, "conversation", 1) == (PreferenceRow([SYSTEM, USER], [YES], [NO], 1), [])


@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER]])
@pytest.mark.parametrize("start", [[], [USER], [SYSTEM, USER]])
def test_an_answer_of_several_messages_stays_whole_beside_a_column_system(prompt: Any, start: Any) -> None:
    answer = [YES, {"role": "tool", "content": "3"}, NO]
    row = {"system": "Be brief", "prompt": prompt, "chosen": [*start, *answer], "rejected": [*start, NO]}
    assert convert(row, "conversation", 1)[0] == PreferenceRow([SYSTEM, USER], answer, [NO], 1)


def test_a_system_message_of_the_conversation_itself_comes_before_the_column() -> None:
    own = {"role": "system", "content": "Be long"}
    row, _ = convert({"system": "Be brief", "chosen": [own, USER, YES], "rejected": [own, USER, NO]}, "conversation", 1)
    assert row and row.prompt == [own, USER]


def test_a_system_text_that_a_format_has_no_place_for_is_counted() -> None:
    assert kinds({**PLAIN, "system": "Be brief"}, "prompt") == {"column system not read"}
    assert kinds({**PLAIN, "system": " "}, "prompt") == set() == kinds({**PLAIN, "system": None}, "prompt")
    assert detect_format([{**PLAIN, "system": ""}, PLAIN]) == "prompt"
    assert detect_format([PLAIN, {**PLAIN, "system": "Be brief"}, PLAIN]) == "conversation"


def test_roles_of_sharegpt_are_translated_and_others_refused() -> None:
    def side(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"from": role, "value": text} for role, text in turns]

    start = side(("system", "s"), ("human", "Hi"), ("function_call", "{}"), ("observation", "3"))
    row, problems = convert(
        {"chosen": [*start, *side(("gpt", "Yes"))], "rejected": [*start, *side(("bot", "No"))]}, "conversation", 1
    )
    assert row and not problems
    assert [message["role"] for message in row.prompt] == ["system", "user", "assistant", "tool"]  # type: ignore[index]
    odd = {"chosen": side(("human", "Hi"), ("narrator", "a"), ("gpt", "b")), "rejected": [USER, NO]}
    row, problems = convert(odd, "conversation", 1)
    assert row is None and "from str 'narrator'" in problems[0].detail


def test_a_question_beside_whole_conversations_is_a_further_column() -> None:
    whole = {"chosen": [USER, YES], "rejected": [USER, NO]}
    for more in ({"question": "Other"}, {"input": {"a": 1}}):
        assert convert(whole | more, "conversation", 1) == (PreferenceRow([USER], [YES], [NO], 1), [])


def test_roles_of_sharegpt_under_the_key_role_are_translated_too() -> None:
    row = {"chosen": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yes"}], "rejected": [USER, NO]}
    assert convert(row, "conversation", 1) == (PreferenceRow([USER], [YES], [NO], 1), [])
    developer = {"role": "developer", "content": "x"}
    row_with_other, problems = convert({"chosen": [developer, YES], "rejected": [developer, NO]}, "conversation", 1)
    assert row_with_other and row_with_other.prompt == [developer] and not problems


OTHERS = "completion holds a message that is not the assistant's"
CALL = [{"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}, {"role": "tool", "content": "3"}]


@pytest.mark.parametrize("prompt", [{}, {"prompt": [USER]}, {"prompt": "Hi"}])
@pytest.mark.parametrize("said", [CALL, [NO, USER]])
def test_completions_begin_where_two_conversations_part(prompt: dict[str, Any], said: list[Any]) -> None:
    """Whatever a tool or a user says after that stands within a completion, and is counted."""
    whole = prompt | {"chosen": [USER, *said, YES], "rejected": [USER, YES]}
    assert convert(whole, "conversation", 1)[0] == PreferenceRow([USER], [*said, YES], [YES], 1)
    assert kinds(whole, "conversation") == {OTHERS}
    later = prompt | {"chosen": [USER, *said, YES], "rejected": [USER, *said, NO]}
    assert convert(later, "conversation", 1)[0] == PreferenceRow([USER, *said], [YES], [NO], 1)
    assert kinds(later, "conversation") == set()


def test_conversations_of_which_one_is_the_beginning_of_the_other_part_at_an_answer() -> None:
    row = {"chosen": [USER, YES, USER, NO], "rejected": [USER, YES]}
    assert convert(row, "conversation", 1)[0] == PreferenceRow([USER], [YES, USER, NO], [YES], 1)


EARLIER = {"role": "user", "content": "Before"}


@pytest.mark.parametrize(
    ("prompt", "start", "whole"),
    [
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),  # the end of the prompt is repeated
        ([EARLIER, NO, USER], [NO, USER], [EARLIER, NO, USER]),
        ([EARLIER, NO], [USER], [EARLIER, NO, USER]),  # and here it goes on
        ("Hi", [SYSTEM, USER], [SYSTEM, USER]),  # it stands within the sides
        ("Hi", [EARLIER, NO, USER], [EARLIER, NO, USER]),
        ("Hi\n", [USER], [USER]),  # but for white space
        ([SYSTEM, USER], [SYSTEM, USER], [SYSTEM, USER]),
        ([USER, YES], [USER], [USER]),  # it is the conversation with its answer: the sides have their own
        ([SYSTEM, USER, YES], [USER], [SYSTEM, USER]),
        ([], [USER], [USER]),
        ("", [USER], [USER]),
    ],
)
def test_no_message_of_an_explicit_prompt_is_lost(prompt: Any, start: list[Any], whole: list[Any]) -> None:
    row = {"prompt": prompt, "chosen": [*start, YES], "rejected": [*start, NO]}
    assert convert(row, "conversation", 1) == (PreferenceRow(whole, [YES], [NO], 1), [])


def test_a_completion_may_repeat_the_message_that_it_answers() -> None:
    said = {"prompt": [USER], "chosen": [YES, USER, YES], "rejected": [NO, USER, NO]}
    row = convert(said, "conversation", 1)[0]
    assert row == PreferenceRow([USER], [YES, USER, YES], [NO, USER, NO], 1)


@pytest.mark.parametrize("prompt", ["Before", [EARLIER], [SYSTEM, EARLIER]])
def test_sides_that_neither_repeat_the_prompt_nor_go_on_from_it_make_a_bad_row(prompt: Any) -> None:
    row, problems = convert({"prompt": prompt, "chosen": [USER, YES], "rejected": [USER, NO]}, "conversation", 1)
    assert row is None
    assert problems == [Problem("prompts differ", "'chosen' neither repeats the prompt nor goes on from it")]


def test_the_turns_of_a_history_come_before_the_question() -> None:
    row = {"instruction": "Hi", "history": [["Before", "No"]], "chosen": "Yes", "rejected": "No"}
    assert detect_format([row]) == "conversation"
    assert convert(row, "conversation", 1) == (PreferenceRow([EARLIER, NO, USER], [YES], [NO], 1), [])
    for empty in ([], None):
        assert convert(row | {"history": empty}, "conversation", 1) == (PreferenceRow([USER], [YES], [NO], 1), [])
    for wrong in ([["Before"]], ["Before"], [["Before", 3]], "Before: No"):
        assert kinds(row | {"history": wrong}, "conversation") == {"not a list of role/content messages"}


def test_a_prompt_that_both_completions_repeat_is_taken_off_them_and_counted() -> None:
    row = {"prompt": "Q: why?\nA:", "chosen": "Q: why?\nA: Yes", "rejected": "Q: why?\nA: No"}
    again = Problem("both completions repeat the prompt", "it is taken off them")
    assert convert(row, "prompt", 1) == (PreferenceRow("Q: why?\nA:", " Yes", " No", 1), [again])
    one = row | {"rejected": " No"}
    assert convert(one, "prompt", 1) == (PreferenceRow("Q: why?\nA:", "Q: why?\nA: Yes", " No", 1), [])
    greeting = {"prompt": "Hello", "chosen": "Hello! How can I help?", "rejected": "Hello there"}
    assert convert(greeting, "prompt", 1) == (PreferenceRow(*greeting.values(), 1), [])


def test_conversations_that_part_at_a_users_message_have_different_prompts() -> None:
    other = {"role": "user", "content": "Ho"}
    assert kinds({"chosen": [other, YES], "rejected": [USER, NO]}, "conversation") == {"prompts differ"}
    row = {"chosen": [USER, YES, other, YES], "rejected": [USER, YES, USER, NO]}
    assert convert(row, "conversation", 1)[0] == PreferenceRow([USER], row["chosen"][1:], row["rejected"][1:], 1)


def test_the_format_is_told_by_most_of_the_first_rows() -> None:
    assert detect_format([HH]) == "hh"
    assert detect_format([PLAIN]) == "prompt"
    assert detect_format([{"chosen": 3}, {"chosen": "x", "rejected": ""}, HH]) == "hh"
    assert detect_format([{**PLAIN, "prompt": None, "chosen": HH["chosen"]}, PLAIN, PLAIN]) == "prompt"


def test_an_unknown_schema_names_its_columns_and_the_forms_accepted() -> None:
    with pytest.raises(UserError) as caught:
        detect_format([{"question": "q", "answer": "a"}, {"score": 1}], "file.jsonl")
    message = str(caught.value)
    assert message.startswith("file.jsonl: no known preference format; columns found: answer, question, score; accep")
    assert all(name in message for name in ("hh (", "prompt (", "conversation (")) and "\n" not in message
    with pytest.raises(UserError, match="columns found: chosen, rejected"):
        detect_format([{"chosen": "no transcript", "rejected": "no prompt"}])


@pytest.mark.parametrize(
    ("kind", "form", "row"),
    [
        ("missing field", "hh", {"chosen": HH["chosen"]}),
        ("missing field", "prompt", {**PLAIN, "rejected": None}),
        ("missing field", "prompt", {}),
        ("missing field", "conversation", {"prompt": [USER], "chosen": [YES]}),
        ("not a string", "hh", {**HH, "rejected": 3}),
        ("not a string", "prompt", {**PLAIN, "chosen": True}),
        ("not a string", "conversation", {"chosen": 5, "rejected": [NO]}),
        ("not a string", "conversation", {"prompt": [USER], "chosen": [{**YES, "content": None}], "rejected": [NO]}),
        ("not a list of role/content messages", "conversation", {"chosen": [], "rejected": [NO]}),
        ("not a list of role/content messages", "conversation", {"chosen": ["x"], "rejected": [NO]}),
        ("not a list of role/content messages", "conversation", {"chosen": [{"text": "x"}], "rejected": [NO]}),
        ("no Assistant turn", "hh", {**HH, "chosen": "Hi"}),
        ("no Assistant turn", "conversation", {"chosen": [USER, YES, USER], "rejected": [USER, NO]}),
    ],
)
def test_a_row_that_is_no_preference_has_one_problem(kind: str, form: str, row: dict[str, Any]) -> None:
    preference, problems = convert(row, form, 1)
    assert preference is None and [problem.kind for problem in problems] == [kind]
    assert problems[0].detail and "\n" not in problems[0].detail


@pytest.mark.parametrize(
    ("kind", "form", "change"),
    [
        ("chosen == rejected", "hh", {"rejected": HH["chosen"]}),
        ("chosen == rejected", "prompt", {"rejected": " Yes"}),
        ("chosen == rejected", "conversation", {"rejected": [USER, YES]}),
        ("empty response", "hh", {"rejected": "\n\nHuman: Hi\n\nAssistant: "}),
        ("empty response", "prompt", {"chosen": ""}),
        ("empty response", "conversation", {"chosen": [USER, {"role": "assistant", "content": " \n"}]}),
        ("prompts differ", "hh", {"rejected": "\n\nHuman: Ho\n\nAssistant: No"}),
        ("prompts differ", "conversation", {"rejected": [SYSTEM, USER, NO]}),
        ("completion holds a further Human turn", "hh", {"rejected": HH["rejected"] + "\n\nHuman: more"}),
        ("empty prompt", "prompt", {"prompt": " "}),
        ("empty prompt", "conversation", {"chosen": [YES], "rejected": [NO]}),
        ("contains NUL", "prompt", {"chosen": "a\x00b"}),
        ("broken Unicode", "prompt", {"rejected": "a\ud83d"}),
    ],
)
def test_an_odd_row_is_kept_with_its_kind(kind: str, form: str, change: dict[str, Any]) -> None:
    good: dict[str, dict[str, Any]] = {"hh": HH, "prompt": PLAIN, "conversation": CONVERSATIONS["implicit"]}
    assert kinds(good[form], form) == set()
    preference, _ = convert({**good[form], **change}, form, 1)
    assert preference is not None and kinds({**good[form], **change}, form) == {kind}


def test_a_row_has_every_kind_that_fits() -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: b\n\nAssistant: x\n\nHuman: \x00"}
    assert kinds(row, "hh") == {
        "empty response", "prompts differ", "completion holds a further Human turn", "contains NUL",
    }  # fmt: skip


def test_only_a_dialogue_has_human_turns() -> None:
    text = {"chosen": "a\n\nHuman: b", "rejected": "c"}
    assert kinds({"prompt": "Write a play.", **text}, "prompt") == set()
    assert kinds({"prompt": "\n\nHuman: Hi\n\nAssistant:", **text}, "prompt") == {
        "completion holds a further Human turn"
    }


def test_the_text_of_messages_is_their_contents() -> None:
    assert content_of("a") == "a" and content_of([USER, YES]) == "HiYes"


def test_real_conversations_are_read_whole(shared_data: Path) -> None:
    rows = json.loads(gzip.decompress((shared_data / "llamafactory-dpo-en-demo/dpo_en_demo.json.gz").read_bytes()))
    assert detect_format(rows[:100]) == "conversation"
    found = [convert(row, "conversation", number) for number, row in enumerate(rows, start=1)]
    assert all(row for row, _ in found)
    odd = {problem.kind for _, problems in found for problem in problems}
    assert odd == {"control character", "invisible character"}
    assert sum(row.prompt[0]["role"] == "system" for row, _ in found if row) == 80  # type: ignore[index]


def test_ratings_make_the_margin_and_equal_ones_a_tie() -> None:
    scores = ({"score_chosen": 4, "score_rejected": 2.5}, {"chosen_score": 0, "rejected_score": -1.5})
    for columns in ({"margin": 1.5}, *scores):
        row, problems = convert(PLAIN | columns, "prompt", 1)
        assert row is not None and row.margin == 1.5 and not problems
    row, _ = convert(PLAIN, "prompt", 1)
    assert row is not None and row.margin is None
    row, problems = convert(PLAIN | {"margin": None, "score_chosen": 1, "score_rejected": 3}, "prompt", 1)
    assert row is not None and row.margin == -2 and [p.kind for p in problems] == ["chosen rated below rejected"]
    row, problems = convert(PLAIN | {"score_chosen": 3, "score_rejected": 3.0}, "prompt", 1)
    assert row is None and [p.kind for p in problems] == ["tie"]
    for value in ("3", True, float("nan")):
        assert kinds(PLAIN | {"margin": value}, "prompt") == {"not a number"}


def test_characters_that_nobody_sees_are_noted_by_code_point() -> None:
    _, problems = convert(PLAIN | {"chosen": " a\x1b[31m", "rejected": " b\u202e"}, "prompt", 1)
    assert problems == [("control character", "U+001B in chosen"), ("invisible character", "U+202E in rejected")]
    assert kinds(PLAIN | {"chosen": "\ta\r\n\u200d\u00e9"}, "prompt") == set()


def test_tools_and_template_arguments_are_read_as_lists_or_json() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": None}}
    bare = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], json.dumps([tool])):
        row, problems = convert(
            {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
            | {"tools": tools, "chat_template_kwargs": {"a": 1, "b": None}},
            "conversation",
            1,
        )
        assert row is not None and row.tools == [bare] and row.chat_template_kwargs == {"a": 1} and not problems
    row, _ = convert({"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": ""}, "conversation", 1)
    assert row is not None and row.tools is None and row.chat_template_kwargs is None
    for broken in ({"tools": "{"}, {"tools": {"a": 1}}, {"chat_template_kwargs": [1]}):
        assert kinds({"prompt": [USER], "chosen": [YES], "rejected": [NO], **broken}, "conversation") == {
            "tools or chat_template_kwargs not readable"
        }


def test_calls_of_tools_are_content_and_answers_of_tools_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
    result = {"role": "tool", "content": "42", "tool_call_id": "1", "weight": 0.5}
    row, problems = convert({"prompt": [USER, call, result], "chosen": [call], "rejected": [NO]}, "conversation", 1)
    kept = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert row is not None and not problems and row.chosen == [kept]
    assert row.prompt == [USER, kept, {"role": "tool", "content": "42", "tool_call_id": "1"}]


def test_columns_with_long_names_leave_room_for_what_to_do():
    with pytest.raises(UserError) as raised:
        detect_format([{"x" * 5000: 1}], "rows.jsonl")
    assert len(str(raised.value)) < 900 and "x..." in str(raised.value)


@pytest.mark.parametrize("text", ['[{"a": 1}]', "[{not JSON", "[{}]", '["role"]'])
def test_text_that_only_looks_like_messages_is_text(text):
    row = {"prompt": "p", "chosen": text, "rejected": "[1]"}
    assert detect_format([row]) == "prompt" and convert(row, "prompt", 1)[0] == PreferenceRow("p", text, "[1]", 1)


def test_parts_of_a_message_that_are_no_text_are_refused():
    parts = [{"type": "text", "text": "Yes"}, {"type": "image", "image": "x.png"}]
    row = {"prompt": [USER], "chosen": [YES | {"content": parts}], "rejected": [NO]}
    assert kinds(row, "conversation") == {NOT_TEXT}
