"""What can be odd about a row: its kinds, as they are counted, and those that its texts alone show.

Serves `formats.py`, which reads rows, `labels.py` and `encode.py`. A kind in KEPT is counted and the row kept, a tie
makes no pair, every other kind makes a row bad: refused, or dropped and counted (`data.on_bad_row`).
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from dpo.types import Message, PreferenceRow

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

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
NOT_A_NUMBER = "not a number"
NOT_TOOLS = "tools or chat_template_kwargs not readable"
TIE = "tie"
LOWER = "chosen rated below rejected"
CONTROL = "control character"
INVISIBLE = "invisible character"
OTHERS_TURN = "completion holds a message that is not the assistant's"
SYSTEM_UNREAD = "column system not read"
REPEATED = "both completions repeat the prompt"
KEPT = (LOWER, CONTROL, INVISIBLE, OTHERS_TURN, SYSTEM_UNREAD, REPEATED)

_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")  # zero width, bidi


class Problem(NamedTuple):
    """What is wrong with a row: its kind, as counted, and what exactly was found."""

    kind: str
    detail: str


class Unusable(Exception):
    """A row that cannot be turned into a PreferenceRow at all."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(kind, detail)


def content_of(part: str | list[Message]) -> str:
    """Return the text of a prompt or completion: the contents of several messages joined, calls of tools as JSON."""
    if isinstance(part, str):
        return part
    calls = (json.dumps(message["tool_calls"]) if message.get("tool_calls") else "" for message in part)
    return "".join(message["content"] + called for message, called in zip(part, calls, strict=True))


def transcript(prompt: str | list[Message]) -> str:
    """A prompt as a person or a judge reads it: messages with their roles."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def text_problems(row: PreferenceRow) -> list[Problem]:
    """Find what is odd about the texts of a row, each side looked at by itself."""
    problems = []
    texts = {"prompt": content_of(row.prompt), "chosen": content_of(row.chosen), "rejected": content_of(row.rejected)}
    if not texts["prompt"].strip():
        problems.append(Problem(EMPTY_PROMPT, "the prompt has no text"))
    if empty := [side for side in ("chosen", "rejected") if not texts[side].strip()]:
        problems.append(Problem(EMPTY_RESPONSE, f"{' and '.join(empty)} has no text"))
    if human := [side for side in ("chosen", "rejected") if _holds_human_turn(row, side)]:
        problems.append(Problem(HUMAN_TURN, f"{' and '.join(human)} goes on after the answer"))
    if others := [side for side in ("chosen", "rejected") if _roles(getattr(row, side)) - {"assistant"}]:
        problems.append(Problem(OTHERS_TURN, f"{' and '.join(others)}: it is read, not scored"))
    if nul := [name for name, text in texts.items() if "\x00" in text]:
        problems.append(Problem(CONTAINS_NUL, f"a NUL character in {' and '.join(nul)}"))
    if broken := [name for name, text in texts.items() if not _is_unicode(text)]:
        problems.append(Problem(BROKEN_UNICODE, f"half a surrogate pair in {' and '.join(broken)}"))
    for kind, pattern in ((CONTROL, _CONTROL), (INVISIBLE, _INVISIBLE)):
        found = {name: match.group() for name, text in texts.items() if (match := pattern.search(text))}
        if found:
            problems.append(Problem(kind, ", ".join(f"U+{ord(char):04X} in {name}" for name, char in found.items())))
    return problems


def _holds_human_turn(row: PreferenceRow, side: str) -> bool:
    completion = getattr(row, side)
    # Only a dialogue has turns: other plain text may well speak of "Human:".
    is_dialogue = isinstance(completion, str) and (HUMAN in row.prompt or ASSISTANT in row.prompt)
    return is_dialogue and HUMAN in completion


def _roles(part: str | list[Message]) -> set[str]:
    return set() if isinstance(part, str) else {message["role"] for message in part}


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
