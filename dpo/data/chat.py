"""Conversation -> texts, by the tokenizer's chat template: the prompt up to where the model answers, and the answer.

An answer ends with the end-of-turn token that the template itself writes; what the template writes after it is cut. An
answer of several messages is cut where the assistant begins and ends to speak, since the words of tools and users in it
are not the model's to learn. `boundary.py` makes ids of the texts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.errors import UserError
from dpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "qZ7answerZq"


def read_chat_template(value: str) -> str:
    """Return the template that a setting means: the text itself, or the content of the file it names.

    Raises:
        UserError: Neither template text nor a readable file.
    """
    if "{{" in value or "{%" in value:
        return value
    try:
        file = Path(os.path.expanduser(value))
        if not file.is_file():  # a device would be read for ever
            raise FileNotFoundError(value)
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.chat_template '{value}': neither template text nor a readable file; give one of them"
        ) from error


class ChatTemplate:
    """A tokenizer's chat template, and how it ends a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._turn_ends: dict[str, tuple[str, str, int]] = {}
        self._specials = special_tokens(tokenizer)

    def render(
        self, messages: list[Message], *, answer_next: bool, options: Mapping[str, Any] | None = None
    ) -> str:
        """Render a conversation with the template's options; with `answer_next` up to where the model answers."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise UserError(
                "the data is conversations (strings beside a column system, question or instruction are one too) and "
                "the tokenizer has no chat template: give one with model.chat_template (template text or file), use an "
                "instruction-tuned model, or leave these columns out by data.format prompt"
            )
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, **(options or {})
            )
            str(rendered).encode("utf-8")  # half a surrogate pair, in a role or a call, cannot be given to a tokenizer
        except Exception as error:  # a template may raise whatever it likes
            reason = f"{' '.join(str(error).split()) or type(error).__name__}; fix it"
            raise UserError(f"the chat template (model.chat_template) refuses a conversation: {reason}") from error
        return str(rendered)

    def render_answer(
        self,
        prompt: list[Message],
        answer: list[Message],
        rendered_prompt: str,
        options: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Render a conversation and cut what follows its prompt, up to and with the end of the last turn.

        Returns:
            One text for an answer of one message. Else at even places the turns of the assistant, each with its end,
            and at odd ones what stands between them: the words of tools and users, and the start of the next turn.
        Raises:
            UserError: The template writes otherwise what comes before a message, or refuses the conversation.
        """
        tail, end, _ = self.turn_end(options)
        full = self.render([*prompt, *answer], answer_next=False, options=options)
        if not full.startswith(rendered_prompt):
            raise UserError("the rendered conversation does not start with its rendered prompt")
        if not full.endswith(tail):
            raise UserError("the rendered conversation does not end as other conversations do")
        full = full[: len(full) - len(tail)] + end
        turns = [place for place, message in enumerate(answer) if message["role"] == "assistant"]
        cuts = [len(rendered_prompt)]
        for turn, following in pairwise(turns):
            cuts.append(self._end_of_turn(full, cuts[-1], [*prompt, *answer[: turn + 1]], options))
            before = self.render([*prompt, *answer[:following]], answer_next=True, options=options)
            if not full.startswith(before) or len(before) < cuts[-1]:
                raise UserError("the conversation up to a later answer is rendered otherwise when that follows")
            cuts.append(len(before))
        return [full[start:stop] for start, stop in pairwise([*cuts, len(full)])]

    def _end_of_turn(
        self, full: str, start: int, so_far: list[Message], options: Mapping[str, Any] | None
    ) -> int:
        """Find where in a rendered conversation the turn ends that begins at `start` and is the last of `so_far`."""
        tail, end, _ = self.turn_end(options)
        alone = self.render(so_far, answer_next=False, options=options)
        if alone.endswith(tail):
            alone = alone[: len(alone) - len(tail)] + end
        if full.startswith(alone):
            return len(alone)
        # Some templates write a turn with its reasoning only where it is the last.
        stop = full.find(end, start)
        if stop < 0 or any(token in full[start:stop] for token in self._specials):
            raise UserError("where a turn of the assistant ends cannot be told from how it is rendered")
        return stop + len(end)

    def unread(self, messages: list[Message], rendered: str, options: Mapping[str, Any] | None = None) -> str | None:
        """Say which part of a prompt the chat template leaves out, None where it tells the model all of it.

        Messages of the assistant are not looked at: templates leave out the reasoning in earlier ones.

        Args:
            messages: The prompt.
            rendered: The same as `render` gives it with `answer_next`.
            options: Of the template, `tools` among them.
        """
        for place, message in enumerate(messages):
            text = message["content"].strip()
            if message["role"] == "assistant" or text in rendered:
                continue
            # It may be there in another form, as JSON for one; then another content gives another prompt.
            other = [*messages[:place], {**message, "content": f"{text}{_ANSWER}"}, *messages[place + 1 :]]
            if self.render(other, answer_next=True, options=options) == rendered:
                return f"a message of the role {message['role']}"
        if options and options.get("tools"):
            without = {name: value for name, value in options.items() if name != "tools"}
            if self.render(messages, answer_next=True, options=without) == rendered:
                return "the tools"
        return None

    def turn_end(self, options: Mapping[str, Any] | None = None) -> tuple[str, str, int]:
        """Find how the chat template ends an answer.

        Args:
            options: Of the template; tools do not matter.
        Returns:
            What it writes after an answer; this up to and with its end-of-turn token; the id of that token.
        Raises:
            UserError: It writes no such token, or not the prompt that it writes for generation.
        """
        options = {name: value for name, value in (options or {}).items() if name != "tools"}
        key = json.dumps(options, sort_keys=True, default=str)
        if key in self._turn_ends:
            return self._turn_ends[key]
        question: list[Message] = [{"role": "user", "content": "Hello"}]
        prompt = self.render(question, answer_next=True, options=options)
        answered: list[Message] = [*question, {"role": "assistant", "content": _ANSWER}]
        full = self.render(answered, answer_next=False, options=options)
        if not full.startswith(prompt) or _ANSWER not in full[len(prompt) :]:
            raise UserError(
                "the chat template writes another beginning before an answer than its generation prompt, so training "
                "would differ from inference: give one that agrees with model.chat_template"
            )
        tail = full.rpartition(_ANSWER)[2]
        ids = self._tokenizer(tail, add_special_tokens=False)["input_ids"]
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        end_id = next((token for token in ids if token in special), None)
        token = "" if end_id is None else str(self._tokenizer.convert_ids_to_tokens(end_id))
        if end_id is None or token not in tail:
            raise UserError(
                f"the chat template writes no end-of-turn token after an answer but {tail.strip()!r}, in which this "
                "tokenizer knows none, so the model would never learn to stop: give one that does, such as "
                f"{self._tokenizer.eos_token}, with model.chat_template"
            )
        self._turn_ends[key] = tail, tail[: tail.index(token) + len(token)], end_id
        return self._turn_ends[key]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that a tokenizer takes for one token each, and for no text."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def listed(ids: int | list[int] | None) -> list[int]:
    """Ids as generation settings have them: one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def end_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: EOS, and what the tokenizer's chat template writes after a turn, where it serves."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(UserError):
            ends.append(int(ChatTemplate(tokenizer).turn_end()[2]))
    return list(dict.fromkeys(ends))
