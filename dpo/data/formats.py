"""A source's schema -> PreferenceRow: the second step of the data flow.

Three formats hold pairs: "hh" (chosen and rejected are whole transcripts), "prompt" (three strings) and "conversation"
(lists of role/content messages, the prompt explicit or implied). `convert` never raises: it returns the row, as far as
there is one, and everything odd about it, so that each kind can be counted by itself. A row may have several.
To read another schema, add a function here and its name to `_READERS`. Rows of labels are turned into pairs by
`labels.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpo.data.fields import (
    QUESTIONS,
    messages_of,
    number_of,
    parsed,
    questions_of,
    string_of,
    system_of,
    with_messages,
)
from dpo.data.kinds import (
    ASSISTANT,
    CHOSEN_IS_REJECTED,
    LOWER,
    NO_ASSISTANT,
    PROMPTS_DIFFER,
    REPEATED,
    SYSTEM_UNREAD,
    TIE,
    Problem,
    Unusable,
    text_problems,
)
from dpo.errors import UserError
from dpo.types import Message, PreferenceRow

FORMATS = ("auto", "hh", "prompt", "conversation", "ranked", "votes")

_RATINGS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
_ACCEPTED = (
    "accepted, columns renamed where need be: "
    "hh (chosen and rejected: transcripts with '\\n\\nHuman:' and '\\n\\nAssistant:'), "
    "prompt (prompt, chosen, rejected: strings), "
    "conversation (chosen and rejected: lists of {role, content}, with or without a prompt; or strings and question), "
    "ranked (prompt, completions, scores), "
    "votes (prompt, response1, response2, label)"
)


def detect_format(rows: Iterable[Mapping[str, Any]], path: str = "the data") -> str:
    """Tell the format from the first rows: the one that most of them have.

    Three strings beside a text in `system` are a conversation: plain text has no place for it.

    Args:
        rows: The first rows of a source; a few dozen are plenty, a broken one among them does no harm.
        path: Name of the source, for the message.
    Returns:
        "hh", "prompt", "conversation", "ranked" or "votes".
    Raises:
        UserError: None of the rows is in a known format; names the columns found and the forms accepted.
    """
    rows = [with_messages(row) for row in rows]
    votes = Counter(form for row in rows if (form := _form_of(row)))
    if not votes:
        columns = sorted({str(key) for row in rows for key in row})
        names = ", ".join(column if len(column) <= 40 else f"{column[:40]}..." for column in columns[:12])
        raise UserError(f"{path}: no known preference format; columns found: {names}; {_ACCEPTED}")
    form = votes.most_common(1)[0][0]
    return "conversation" if form == "prompt" and any(map(system_of, rows)) else form


def convert(row: Mapping[str, Any], form: str, number: int) -> tuple[PreferenceRow | None, list[Problem]]:
    """Turn one row of a source into a PreferenceRow.

    Args:
        row: The row as read.
        form: "hh", "prompt" or "conversation".
        number: 1-based number of the row in its source.
    Returns:
        The preference and what is odd about it. It is None where the row lacks what makes one, or where it is rated a
        tie; where the prompts of the two sides differ it has that of `chosen`.
    """
    if form == "conversation":
        row = with_messages(row)
    try:
        margin = _margin(row)
        if margin == 0:
            return None, [Problem(TIE, "both sides are rated alike")]
        (prompt, chosen), (other_prompt, rejected) = _READERS[form](row)
        tools = kwargs = None
        if form == "conversation":
            tools, kwargs = parsed(row, "tools", list), parsed(row, "chat_template_kwargs", Mapping)
    except Unusable as error:
        return None, [error.problem]
    preference = PreferenceRow(prompt, chosen, rejected, number, margin, tools, kwargs)
    problems = text_problems(preference)
    if margin is not None and margin < 0:
        problems.append(Problem(LOWER, f"by {-margin:g}"))
    if form == "prompt" and _repeats(row):
        problems.append(Problem(REPEATED, "it is taken off them"))
    if form != "conversation" and system_of(row):
        problems.append(Problem(SYSTEM_UNREAD, f"data.format {form} has no place for it; use conversation"))
    if prompt != other_prompt:
        problems.append(Problem(PROMPTS_DIFFER, "chosen and rejected answer different prompts"))
    elif chosen == rejected:
        problems.append(Problem(CHOSEN_IS_REJECTED, "both sides are the same text"))
    return preference, problems


# --- readers: each returns (prompt, chosen), (prompt, rejected) ------------------------------------------------------

Part = Any  # str | list[Message]; both sides and the prompt of a row have the same of the two
Sides = tuple[tuple[Part, Part], tuple[Part, Part]]


def _read_hh(row: Mapping[str, Any]) -> Sides:
    return _split_transcript(row, "chosen"), _split_transcript(row, "rejected")


def _split_transcript(row: Mapping[str, Any], column: str) -> tuple[str, str]:
    text = string_of(row, column)
    head, marker, completion = text.rpartition(ASSISTANT)
    if not marker:
        raise Unusable(NO_ASSISTANT, f"'{column}' holds no '\\n\\nAssistant:'")
    return head + marker, completion


def _read_prompt(row: Mapping[str, Any]) -> Sides:
    prompt, chosen, rejected = (string_of(row, column) for column in ("prompt", "chosen", "rejected"))
    if _repeats(row):
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    return (prompt, chosen), (prompt, rejected)


def _repeats(row: Mapping[str, Any]) -> bool:
    """Whether both completions of plain text begin with their prompt, which then is no part of the answer.

    Of a few words an answer may begin with them by itself: "Hello", and "Hello! How are you?".
    """
    prompt, *sides = (row.get(column) for column in ("prompt", "chosen", "rejected"))
    if not isinstance(prompt, str) or ("\n" not in prompt.strip() and len(prompt.split()) < 4):
        return False
    return all(isinstance(side, str) and side.startswith(prompt) for side in sides)


def _read_conversation(row: Mapping[str, Any]) -> Sides:
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    column = next((name for name in ("prompt", "conversations") if row.get(name)), None)
    prompt = None if column is None else messages_of(row, column, role="user")
    if prompt is None and chosen[0]["role"] == "assistant":
        prompt = questions_of(row)
    system = system_of(row)
    if prompt is not None:
        prompt = _without_system(prompt, system)
    whole = [
        _whole(prompt, _without_system(messages, system), name)
        for name, messages in (("chosen", chosen), ("rejected", rejected))
    ]
    begins = [_shared(*whole) or len(side) - 1 for side in whole]
    (first, own), (second, other) = ((side[:n], side[n:]) for side, n in zip(whole, begins, strict=True))
    return (_with_system(first, system), own), (_with_system(second, system), other)


def _whole(prompt: list[Message] | None, messages: list[Message], column: str) -> list[Message]:
    """A side's conversation from its start; the side may hold the answer alone, or repeat the prompt or its end."""
    if messages[-1]["role"] != "assistant":
        raise Unusable(NO_ASSISTANT, f"the last message of '{column}' is the {messages[-1]['role']}'s")
    answers_alone = messages[0]["role"] == "assistant"
    if prompt is None or (not answers_alone and _stands_in(prompt, messages)):
        return messages
    for repeated in range(min(len(prompt), len(messages) - 1), 0, -1):
        if _same(prompt[-repeated:], messages[:repeated]):
            return [*prompt, *messages[repeated:]]
    if answers_alone:
        return [*prompt, *messages]
    system = prompt[: prompt[0]["role"] == "system"]
    if _same(prompt[len(system) :][:1], messages[:1]):  # and then another answer follows
        return [*system, *messages]
    if prompt[-1]["role"] == "assistant":
        return [*prompt, *messages]
    raise Unusable(PROMPTS_DIFFER, f"'{column}' neither repeats the prompt nor goes on from it")


def _same(some: list[Message], others: list[Message]) -> bool:
    """Whether messages are the same but for white space around them."""

    def plain(messages: list[Message]) -> list[Message]:
        return [{**message, "content": message["content"].strip()} for message in messages]

    return plain(some) == plain(others)


def _stands_in(prompt: list[Message], messages: list[Message]) -> bool:
    """Whether a conversation holds the whole prompt, before its last message."""
    size = len(prompt)
    return any(_same(prompt, messages[start : start + size]) for start in range(len(messages) - size))


def _shared(chosen: list[Message], rejected: list[Message]) -> int | None:
    """Messages of the longest beginning of both conversations from which the assistant goes on in both."""
    for n in range(min(len(chosen), len(rejected)) - 1, 0, -1):
        if chosen[:n] == rejected[:n] and chosen[n]["role"] == rejected[n]["role"] == "assistant":
            return n
    return None


def _without_system(messages: list[Message], system: str | None) -> list[Message]:
    """The same without a first message that says what `system` says."""
    says_it = system is not None and messages[0]["role"] == "system" and messages[0]["content"] == system
    return messages[1:] if says_it and len(messages) > 1 else messages


def _with_system(head: list[Message], system: str | None) -> list[Message]:
    """A prompt with its system message; one that it has itself stays."""
    if system is None or not head or head[0]["role"] == "system":
        return head
    return [{"role": "system", "content": system}, *head]


_READERS: dict[str, Callable[[Mapping[str, Any]], Sides]] = {
    "hh": _read_hh,
    "prompt": _read_prompt,
    "conversation": _read_conversation,
}


def _margin(row: Mapping[str, Any]) -> float | None:
    """Read by how much the chosen side is rated above the other; None where no column says."""
    if row.get("margin") is not None:
        return number_of(row["margin"], "margin")
    for columns in _RATINGS:
        if all(row.get(column) is not None for column in columns):
            chosen, rejected = (number_of(row[column], column) for column in columns)
            return chosen - rejected
    return None


def _form_of(row: Mapping[str, Any]) -> str | None:
    """Tell which format one row is in, None where it is in none."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if chosen is None and rejected is None:
        if isinstance(row.get("completions"), list):
            return "ranked"
        return "votes" if "response1" in row and "response2" in row else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return "prompt"
        if ASSISTANT in chosen or ASSISTANT in rejected:
            return "hh"
        asked = any(isinstance(row.get(name), str) for name in QUESTIONS)
        return "conversation" if asked or isinstance(prompt or row.get("conversations"), list) else None
    if isinstance(chosen, (list, Mapping)) and isinstance(rejected, (list, Mapping)):
        return "conversation"
    return None
