"""A source's schema -> PreferenceRow: the second step of the data flow.

Three formats: "hh" (chosen and rejected are whole transcripts), "prompt" (three strings) and "conversation" (lists of
role/content messages, the prompt explicit or implied). `convert` never raises: it returns the row, as far as there is
one, and every problem it has, so that each kind can be counted by itself. A row may have several.
To read another schema, add a function here and its name to `_READERS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from dpo.errors import UserError
from dpo.types import Message, PreferenceRow

FORMATS = ("auto", "hh", "prompt", "conversation")

MISSING = "missing field"
NOT_TEXT = "not a string"
NOT_MESSAGES = "not a list of role/content messages"
NO_ASSISTANT = "no Assistant turn"
EMPTY_PROMPT = "empty prompt"
CHOSEN_IS_REJECTED = "chosen == rejected"
EMPTY_RESPONSE = "empty response"
PROMPTS_DIFFER = "prompts differ"
HUMAN_TURN = "completion holds a further Human turn"
CONTAINS_NUL = "contains NUL"
BROKEN_UNICODE = "broken Unicode"

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ACCEPTED = (
    "accepted: hh (chosen and rejected: transcripts with '\\n\\nHuman:' and '\\n\\nAssistant:'), "
    "prompt (prompt, chosen, rejected: strings), "
    "conversation (chosen and rejected: lists of {role, content}, with or without a prompt)"
)


class Problem(NamedTuple):
    """What is wrong with a row: its kind, as counted, and what exactly was found."""

    kind: str
    detail: str


class _Unusable(Exception):
    """A row that cannot be turned into a PreferenceRow at all."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(kind, detail)


def detect_format(rows: Iterable[Mapping[str, Any]], path: str = "the data") -> str:
    """Tell the format from the first rows: the one that most of them have.

    Args:
        rows: The first rows of a source; a few dozen are plenty, a broken one among them does no harm.
        path: Name of the source, for the message.
    Returns:
        "hh", "prompt" or "conversation".
    Raises:
        UserError: None of the rows is in a known format; names the columns found and the forms accepted.
    """
    rows = list(rows)
    votes = Counter(form for row in rows if (form := _form_of(row)))
    if not votes:
        columns = sorted({str(key) for row in rows for key in row})
        raise UserError(f"{path}: no known preference format; columns found: {', '.join(columns)}; {_ACCEPTED}")
    return votes.most_common(1)[0][0]


def convert(row: Mapping[str, Any], form: str, number: int) -> tuple[PreferenceRow | None, list[Problem]]:
    """Turn one row of a source into a PreferenceRow.

    Args:
        row: The row as read.
        form: "hh", "prompt" or "conversation".
        number: 1-based number of the row in its source.
    Returns:
        The preference and its problems. It is None where the row lacks what makes one; where the prompts of the two
        sides differ it has that of `chosen`.
    """
    try:
        (prompt, chosen), (other_prompt, rejected) = _READERS[form](row)
    except _Unusable as error:
        return None, [error.problem]
    preference = PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, row=number)
    problems = _text_problems(preference)
    if prompt != other_prompt:
        problems.append(Problem(PROMPTS_DIFFER, "chosen and rejected answer different prompts"))
    elif chosen == rejected:
        problems.append(Problem(CHOSEN_IS_REJECTED, "both sides are the same text"))
    return preference, problems


def content_of(part: str | list[Message]) -> str:
    """Return the text of a prompt or completion, the contents of several messages joined."""
    return part if isinstance(part, str) else "".join(message["content"] for message in part)


# --- readers: each returns (prompt, chosen), (prompt, rejected) ------------------------------------------------------

Part = Any  # str | list[Message]; both sides and the prompt of a row have the same of the two
Sides = tuple[tuple[Part, Part], tuple[Part, Part]]


def _read_hh(row: Mapping[str, Any]) -> Sides:
    return _split_transcript(row, "chosen"), _split_transcript(row, "rejected")


def _split_transcript(row: Mapping[str, Any], column: str) -> tuple[str, str]:
    text = _string(row, column)
    head, marker, completion = text.rpartition(_ASSISTANT)
    if not marker:
        raise _Unusable(NO_ASSISTANT, f"'{column}' holds no '\\n\\nAssistant:'")
    return head + marker, completion


def _read_prompt(row: Mapping[str, Any]) -> Sides:
    prompt = _string(row, "prompt")
    return (prompt, _string(row, "chosen")), (prompt, _string(row, "rejected"))


def _read_conversation(row: Mapping[str, Any]) -> Sides:
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    column = "prompt" if row.get("prompt") is not None else "conversations"
    prompt = _messages(row, column, role="user") if row.get(column) is not None else None
    if prompt is not None and isinstance(row.get("system"), str) and row["system"].strip():
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    return _split_conversation(prompt, chosen, "chosen"), _split_conversation(prompt, rejected, "rejected")


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
        raise _Unusable(NO_ASSISTANT, f"the last message of '{column}' is the {answer[-1]['role']}'s")
    return head, answer


_READERS: dict[str, Callable[[Mapping[str, Any]], Sides]] = {
    "hh": _read_hh,
    "prompt": _read_prompt,
    "conversation": _read_conversation,
}


# --- fields ----------------------------------------------------------------------------------------------------------


def _field(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        found = "is null" if column in row else f"is missing; the row has {', '.join(map(str, row)) or 'no field'}"
        raise _Unusable(MISSING, f"'{column}' {found}")
    return value


def _string(row: Mapping[str, Any], column: str) -> str:
    value = _field(row, column)
    if not isinstance(value, str):
        raise _Unusable(NOT_TEXT, f"'{column}' is of type {type(value).__name__}")
    return value


def _messages(row: Mapping[str, Any], column: str, role: str = "assistant") -> list[Message]:
    """Read a list of messages, one message, or a string that is the one message of `role`."""
    value = _field(row, column)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(item, Mapping) for item in messages):
        kind = NOT_TEXT if not isinstance(messages, list) else NOT_MESSAGES
        raise _Unusable(kind, f"'{column}' must hold messages, got {_shown(value)}")
    return [_message(item, column) for item in messages]


def _message(item: Mapping[str, Any], column: str) -> Message:
    role_key, content_key = ("from", "value") if "from" in item and "value" in item else ("role", "content")
    if role_key not in item or content_key not in item:
        raise _Unusable(NOT_MESSAGES, f"a message of '{column}' has {', '.join(map(str, item)) or 'no field'}")
    role, content = item[role_key], item[content_key]
    if not isinstance(role, str) or not isinstance(content, str):
        raise _Unusable(NOT_TEXT, f"a message of '{column}' has role {_shown(role)} and content {_shown(content)}")
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


# --- what can be wrong with a whole row ------------------------------------------------------------------------------


def _text_problems(row: PreferenceRow) -> list[Problem]:
    problems = []
    texts = {"prompt": content_of(row.prompt), "chosen": content_of(row.chosen), "rejected": content_of(row.rejected)}
    if not texts["prompt"].strip():
        problems.append(Problem(EMPTY_PROMPT, "the prompt has no text"))
    if empty := [side for side in ("chosen", "rejected") if not texts[side].strip()]:
        problems.append(Problem(EMPTY_RESPONSE, f"{' and '.join(empty)} has no text"))
    if human := [side for side in ("chosen", "rejected") if _holds_human_turn(row, side)]:
        problems.append(Problem(HUMAN_TURN, f"{' and '.join(human)} goes on after the answer"))
    if nul := [name for name, text in texts.items() if "\x00" in text]:
        problems.append(Problem(CONTAINS_NUL, f"a NUL character in {' and '.join(nul)}"))
    if broken := [name for name, text in texts.items() if not _is_unicode(text)]:
        problems.append(Problem(BROKEN_UNICODE, f"half a surrogate pair in {' and '.join(broken)}"))
    return problems


def _holds_human_turn(row: PreferenceRow, side: str) -> bool:
    completion = getattr(row, side)
    if isinstance(completion, str):
        # Only a dialogue has turns: other plain text may well speak of "Human:".
        return _HUMAN in completion and (_HUMAN in row.prompt or _ASSISTANT in row.prompt)
    return any(message["role"] == "user" for message in completion)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _form_of(row: Mapping[str, Any]) -> str | None:
    """Tell which format one row is in, None where it is in none."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return "prompt"
        if _ASSISTANT in chosen or _ASSISTANT in rejected:
            return "hh"
        return "conversation" if isinstance(prompt or row.get("conversations"), list) else None
    if isinstance(chosen, (list, Mapping)) and isinstance(rejected, (list, Mapping)):
        return "conversation"
    return None
