"""Columns of a row -> text, messages, numbers; or `Unusable`, which says what stands there instead.

Serves `formats.py` and `labels.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from dpo.data.kinds import MISSING, NOT_A_NUMBER, NOT_MESSAGES, NOT_TEXT, NOT_TOOLS, Unusable
from dpo.types import Message

QUESTIONS = ("question", "instruction", "input")
_MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content")
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
    "user": "user", "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


def field_of(row: Mapping[str, Any], column: str) -> Any:
    """Return what stands in a column that must be there; raises Unusable."""
    value = row.get(column)
    if value is None:
        missing = f"is missing; the row has {', '.join(map(str, row)) or 'no field'}"
        found = "is null, or no column of its file" if column in row else missing
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


def with_messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with the messages of columns that hold them as JSON text, as tables and CSV files do."""
    read: dict[str, Any] = {}
    for column in ("prompt", "chosen", "rejected", "conversations"):
        text = row.get(column)
        if isinstance(text, str) and text.lstrip().startswith("[{"):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(text)
                if all(isinstance(item, Mapping) and {"role", "from"} & {*item} for item in value):
                    read[column] = value
    return {**row, **read} if read else row


def _message(item: Mapping[str, Any], column: str) -> Message:
    role_key, content_key = ("from", "value") if "from" in item and "value" in item else ("role", "content")
    if role_key not in item or content_key not in item:
        raise Unusable(NOT_MESSAGES, f"a message of '{column}' has {', '.join(map(str, item)) or 'no field'}")
    role, content = item[role_key], item[content_key]
    more = {key: item[key] for key in _MORE if item.get(key) is not None}
    if content is None and more.get("tool_calls"):
        content = ""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)  # parts of text alone
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable(NOT_TEXT, f"a message of '{column}' has role {shown(role)} and content {shown(content)}")
    if role_key == "from" and role.lower() not in _SHAREGPT_ROLES:
        raise Unusable(NOT_MESSAGES, f"a message of '{column}' is from {shown(role)}")
    return {"role": _SHAREGPT_ROLES.get(role.lower(), role), "content": content, **_without_nulls(more)}


def _without_nulls(value: Any) -> Any:
    """The same without the keys that a table of many rows fills with null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parsed(row: Mapping[str, Any], column: str, kind: type) -> Any:
    """Read a list or mapping, or JSON text of one; None where the row has none; raises Unusable."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise Unusable(NOT_TOOLS, f"'{column}' is text that is not JSON") from error
    if value is not None and not isinstance(value, kind):
        raise Unusable(NOT_TOOLS, f"'{column}' is {shown(value)}")
    return _without_nulls(value) or None


def questions_of(row: Mapping[str, Any]) -> list[Message] | None:
    """Return the prompt of a row that has none by that name.

    The user's message is what there is of `question`, `instruction` and `input`; before it come the turns in `history`,
    pairs of question and answer.

    Raises:
        Unusable: One of them is no text, or `history` holds something else.
    """
    parts = {name: row[name] for name in QUESTIONS if row.get(name) is not None}
    if not parts:
        return None
    if wrong := [name for name, part in parts.items() if not isinstance(part, str)]:
        raise Unusable(NOT_TEXT, f"'{wrong[0]}' is {shown(parts[wrong[0]])}")
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Unusable(NOT_MESSAGES, f"'history' is {shown(history)}, not a list of questions and answers")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise Unusable(NOT_MESSAGES, f"a turn of 'history' is {shown(turn)}, not a question and its answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": "\n\n".join(part for part in parts.values() if part.strip())}]


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


def shown(value: Any) -> str:
    """Name a value in a message: its type and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
