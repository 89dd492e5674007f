"""A source's schema -> PreferenceRow: the second step of the data flow.

Three formats hold pairs: "hh" (chosen and rejected are whole transcripts), "prompt" (three strings) and "conversation"
(lists of role/content messages, the prompt explicit or implied). `convert` never raises: it returns the row, as far as
there is one, and everything odd about it, so that each kind can be counted by itself. A row may have several.
To read another schema, add a function here and its name to `_READERS`. Rows of labels are turned into pairs by
`labels.py`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpo.data.kinds import (
    ASSISTANT,
    CHOSEN_IS_REJECTED,
    LOWER,
    MISSING,
    NO_ASSISTANT,
    NOT_A_NUMBER,
    NOT_MESSAGES,
    NOT_TEXT,
    NOT_TOOLS,
    PROMPTS_DIFFER,
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
_QUESTIONS = ("question", "instruction", "input")
_MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content")
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
    "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
_ACCEPTED = (
    "accepted: hh (chosen and rejected: transcripts with '\\n\\nHuman:' and '\\n\\nAssistant:'), "
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
    rows = list(rows)
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
    try:
        margin = _margin(row)
        if margin == 0:
            return None, [Problem(TIE, "both sides are rated alike")]
        (prompt, chosen), (other_prompt, rejected) = _READERS[form](row)
        tools = kwargs = None
        if form == "conversation":
            tools, kwargs = _parsed(row, "tools", list), _parsed(row, "chat_template_kwargs", Mapping)
    except Unusable as error:
        return None, [error.problem]
    preference = PreferenceRow(prompt, chosen, rejected, number, margin, tools, kwargs)
    problems = text_problems(preference)
    if margin is not None and margin < 0:
        problems.append(Problem(LOWER, f"by {-margin:g}"))
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
    prompt = string_of(row, "prompt")
    return (prompt, string_of(row, "chosen")), (prompt, string_of(row, "rejected"))


def _read_conversation(row: Mapping[str, Any]) -> Sides:
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    column = "prompt" if row.get("prompt") is not None else "conversations"
    prompt = messages_of(row, column, role="user") if row.get(column) is not None else None
    if prompt is None and (question := question_of(row)) is not None:
        prompt = [question]
    system = system_of(row)
    if prompt is not None:
        prompt = _without_system(prompt, system)
    (first, own), (second, other) = (
        _split_conversation(prompt, _without_system(messages, system), name)
        for name, messages in (("chosen", chosen), ("rejected", rejected))
    )
    return (_with_system(first, system), own), (_with_system(second, system), other)


def _without_system(messages: list[Message], system: str | None) -> list[Message]:
    """The same without a first message that says what `system` says."""
    says_it = system is not None and messages[0]["role"] == "system" and messages[0]["content"] == system
    return messages[1:] if says_it and len(messages) > 1 else messages


def _with_system(head: list[Message], system: str | None) -> list[Message]:
    """A prompt with its system message; one that it has itself stays."""
    if system is None or not head or head[0]["role"] == "system":
        return head
    return [{"role": "system", "content": system}, *head]


def _split_conversation(
    prompt: list[Message] | None, messages: list[Message], column: str
) -> tuple[list[Message], list[Message]]:
    """Split a side into prompt and answer; it may hold the answer alone or repeat the whole conversation."""
    if prompt and messages[: len(prompt)] == prompt and len(messages) > len(prompt):
        head, answer = prompt, messages[len(prompt) :]
    elif prompt and messages[0]["role"] == "assistant":
        head, answer = prompt, messages
    else:
        head, answer = messages[:-1], messages[-1:]
    if answer[-1]["role"] != "assistant":
        raise Unusable(NO_ASSISTANT, f"the last message of '{column}' is the {answer[-1]['role']}'s")
    return head, answer


_READERS: dict[str, Callable[[Mapping[str, Any]], Sides]] = {
    "hh": _read_hh,
    "prompt": _read_prompt,
    "conversation": _read_conversation,
}


# --- fields ----------------------------------------------------------------------------------------------------------


def field_of(row: Mapping[str, Any], column: str) -> Any:
    """Return what stands in a column that must be there; raises Unusable."""
    value = row.get(column)
    if value is None:
        found = "is null" if column in row else f"is missing; the row has {', '.join(map(str, row)) or 'no field'}"
        raise Unusable(MISSING, f"'{column}' {found}")
    return value


def string_of(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column; raises Unusable."""
    value = field_of(row, column)
    if not isinstance(value, str):
        raise Unusable(NOT_TEXT, f"'{column}' is of type {type(value).__name__}")
    return value


def messages_of(row: Mapping[str, Any], column: str, role: str = "assistant") -> list[Message]:
    """Read a list of messages, one message, or a string that is the one message of `role`."""
    value = field_of(row, column)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(item, Mapping) for item in messages):
        kind = NOT_TEXT if not isinstance(messages, list) else NOT_MESSAGES
        raise Unusable(kind, f"'{column}' must hold messages, got {shown(value)}")
    return [_message(item, column) for item in messages]


def _message(item: Mapping[str, Any], column: str) -> Message:
    role_key, content_key = ("from", "value") if "from" in item and "value" in item else ("role", "content")
    if role_key not in item or content_key not in item:
        raise Unusable(NOT_MESSAGES, f"a message of '{column}' has {', '.join(map(str, item)) or 'no field'}")
    role, content = item[role_key], item[content_key]
    more = {key: item[key] for key in _MORE if item.get(key) is not None}
    if content is None and more.get("tool_calls"):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable(NOT_TEXT, f"a message of '{column}' has role {shown(role)} and content {shown(content)}")
    if role_key == "from":
        if role not in _SHAREGPT_ROLES:
            raise Unusable(NOT_MESSAGES, f"a message of '{column}' is from {shown(role)}")
        role = _SHAREGPT_ROLES[role]
    return {"role": role, "content": content, **_without_nulls(more)}


def _without_nulls(value: Any) -> Any:
    """The same without the keys that a table of many rows fills with null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(row: Mapping[str, Any], column: str, kind: type) -> Any:
    """Read a list or mapping, or JSON text of one; None where the row has none."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise Unusable(NOT_TOOLS, f"'{column}' is text that is not JSON") from error
    if value is not None and not isinstance(value, kind):
        raise Unusable(NOT_TOOLS, f"'{column}' is {shown(value)}")
    return _without_nulls(value) or None


def question_of(row: Mapping[str, Any]) -> Message | None:
    """Return the user's message of a row that has no prompt: `question`, `instruction` and `input`, what there is.

    Raises:
        Unusable: One of them is no text.
    """
    parts = {name: row[name] for name in _QUESTIONS if row.get(name) is not None}
    if wrong := [name for name, part in parts.items() if not isinstance(part, str)]:
        raise Unusable(NOT_TEXT, f"'{wrong[0]}' is {shown(parts[wrong[0]])}")
    return {"role": "user", "content": "\n\n".join(part for part in parts.values() if part.strip())} if parts else None


def system_of(row: Mapping[str, Any]) -> str | None:
    """Return the text of a column `system`, None where there is none."""
    text = row.get("system")
    return text if isinstance(text, str) and text.strip() else None


def number_of(value: Any, column: str) -> float:
    """Read a finite number of a label column.

    Raises:
        Unusable: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Unusable(NOT_A_NUMBER, f"'{column}' is {shown(value)}")
    return float(value)


def _margin(row: Mapping[str, Any]) -> float | None:
    """Read by how much the chosen side is rated above the other; None where no column says."""
    if row.get("margin") is not None:
        return number_of(row["margin"], "margin")
    for columns in _RATINGS:
        if all(row.get(column) is not None for column in columns):
            chosen, rejected = (number_of(row[column], column) for column in columns)
            return chosen - rejected
    return None


def shown(value: Any) -> str:
    """Name a value in a message: its type and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


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
        asked = any(isinstance(row.get(name), str) for name in _QUESTIONS)
        return "conversation" if asked or isinstance(prompt or row.get("conversations"), list) else None
    if isinstance(chosen, (list, Mapping)) and isinstance(rejected, (list, Mapping)):
        return "conversation"
    return None
