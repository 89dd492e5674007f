"""Text -> token ids, exact at the boundary of prompt and completion.

The prompt is encoded alone, so it is token for token what the model reads at inference; the completion is encoded
without the space that SentencePiece-like tokenizers put before a text, so prompt ids + completion ids decode to
prompt + completion. Ids are joined, never texts: nothing merges across, and nothing is ever read from a pad id.
An answer in a conversation ends with the end-of-turn token that the chat template itself writes; what the template
writes after it is cut.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dpo.errors import UserError
from dpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("", "\n", ":", "a", "=")
_PROBES = ("Hello", " Hello", "\n\nHi", "  two", "\u00e9t\u00e9", "1")
_ANSWER = "qZ7answerZq"
_WINDOW = 24
"""Characters on either side of the boundary that are looked at for merges."""
_TAIL = 256
"""Characters at the end of a rendered prompt among which its last special token is looked for."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    *,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode a prompt as the model sees it, in training and at inference.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        prompt: Plain text (the tokenizer's BOS is added if it adds one), or messages (rendered with the generation
            prompt; the chat template alone decides on a BOS).
        chat_template: Template text to use in place of the tokenizer's own.
        template_options: Further arguments of the template, `tools` among them.
    Returns:
        Token ids, not truncated: at most one BOS, no EOS at the end.
    Raises:
        UserError: Messages, and no chat template or one that refuses them.
    """
    encoder = TextEncoder(tokenizer, chat_template)
    if isinstance(prompt, str):
        return encoder.encode_plain_prompts([prompt])[0]
    return encoder.ids([encoder.render(prompt, answer_next=True, options=template_options)])[0]


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


class TextEncoder:
    """Encode prompts and completions with one tokenizer, knowing what it puts around a text by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        bare, dressed = self.ids(["a"])[0], self.ids(["a"], special=True)[0]
        start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self._num_after = len(dressed) - start - len(bare)
        self._anchor: str | None = None
        self._turn_ends: dict[str, tuple[str, str, int]] = {}
        added = tokenizer.added_tokens_decoder.values()
        self._specials = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        self._adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in dressed[:start]

    def ids(self, texts: list[str], *, special: bool = False) -> list[list[int]]:
        """Tokenise texts; `special` adds what the tokenizer adds by itself."""
        if not texts:
            return []
        encoded: Any = self.tokenizer(
            texts, add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        return cast(list[list[int]], encoded["input_ids"])

    def encode_plain_prompts(self, texts: list[str]) -> list[list[int]]:
        """Encode plain texts as the tokenizer does by itself, without a second BOS or an EOS after the text."""
        bos = str(self.tokenizer.bos_token)
        if self._adds_bos:
            texts = [_strip_start(text, bos) for text in texts]
        encoded = self.ids(texts, special=True)
        return [ids[: len(ids) - self._num_after] for ids in encoded] if self._num_after else encoded

    def render(
        self, messages: list[Message], *, answer_next: bool, options: Mapping[str, Any] | None = None
    ) -> str:
        """Render a conversation with the template's options; with `answer_next` up to where the model answers."""
        if not (self.chat_template or getattr(self.tokenizer, "chat_template", None)):
            raise UserError(
                "the data is conversations (strings beside a column system, question or instruction are one too) and "
                "the tokenizer has no chat template: give one with model.chat_template (template text or file), use an "
                "instruction-tuned model, or leave these columns out by data.format prompt"
            )
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=answer_next,
                **(options or {}),
            )  # fmt: skip
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
    ) -> str:
        """Render a conversation and return what follows its prompt, up to and with the end of the turn.

        Raises:
            UserError: The template writes the prompt otherwise when an answer follows, or refuses the conversation.
        """
        tail, end, _ = self.turn_end(options)
        full = self.render([*prompt, *answer], answer_next=False, options=options)
        if not full.startswith(rendered_prompt):
            raise UserError("the rendered conversation does not start with its rendered prompt")
        if not full.endswith(tail):
            raise UserError("the rendered conversation does not end as other conversations do")
        return full[len(rendered_prompt) : len(full) - len(tail)] + end

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
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        end_id = next((token for token in self.ids([tail])[0] if token in special), None)
        token = "" if end_id is None else str(self.tokenizer.convert_ids_to_tokens(end_id))
        if end_id is None or token not in tail:
            raise UserError(
                "the chat template writes no end-of-turn token after an answer, so the model would never learn to "
                "stop: give one that does with model.chat_template"
            )
        self._turn_ends[key] = tail, tail[: tail.index(token) + len(token)], end_id
        return self._turn_ends[key]

    def merges(self, prompts: list[str], completions: list[str]) -> list[bool]:
        """Tell where encoding a prompt and its completion in one go gives other tokens at the boundary.

        Looked at through a window of a few words on either side: what is further away does not merge.
        """
        tails, heads = [text[-_WINDOW:] for text in prompts], [text[:_WINDOW] for text in completions]
        whole = self.ids([tail + head for tail, head in zip(tails, heads, strict=True)])
        apart = zip(self.ids(tails), self.encode_completions(heads), whole, strict=True)
        return [tail + head != joined for tail, head, joined in apart]

    def encode_completions(self, texts: list[str], after: list[str] | None = None) -> list[list[int]]:
        """Encode texts that follow a prompt: as they stand, nothing in front of them or behind.

        Args:
            texts: To encode.
            after: The end of each text's prompt, from its last special token on (`tail_of`), since some tokenizers
                encode a text differently behind a special token. "" or None: the prompt has none.
        Raises:
            UserError: The tokenizer cannot do so without changing the text.
        """
        if self._anchor is None:
            self._anchor = self._find_anchor()
        places: dict[str, list[int]] = {}
        for index, tail in enumerate(after or [""] * len(texts)):
            places.setdefault(tail or self._anchor, []).append(index)
        found: list[list[int] | None] = [None] * len(texts)
        for anchor, indices in places.items():
            for index, ids in zip(indices, self._encode_after(anchor, [texts[i] for i in indices]), strict=True):
                found[index] = ids
        return [self._encode_alone(text) if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def tail_of(self, prompt: str) -> str:
        """Cut a rendered prompt down to what stands from its last special token on; "" where it has none."""
        end = prompt[-_TAIL:]
        start = max((end.rfind(token) for token in self._specials), default=-1)
        return "" if start < 0 else end[start:]

    def _encode_alone(self, text: str) -> list[int]:
        """Encode a text that merges with what usually stands before it."""
        for anchor in (self._anchor or "", *_ANCHORS[1:]):
            if (ids := self._encode_after(anchor, [text])[0]) is not None:
                return ids
        raise UserError(f"the tokenizer cannot encode this completion by itself: {text[:60]!r}; remove it")

    def _find_anchor(self) -> str:
        """Find a text after which completions are encoded as they stand, "" where none is needed."""
        prompt = self.ids(["Assistant:"])[0]
        # Compared with the whole text encoded at once, not with the text: a tokenizer may normalise it.
        wholes = [self._decode(ids) for ids in self.ids(["Assistant:" + probe for probe in _PROBES])]
        for anchor in _ANCHORS:
            found = self._encode_after(anchor, list(_PROBES))
            if wholes == [None if ids is None else self._decode(prompt + ids) for ids in found]:
                return anchor
        raise UserError(
            f"the tokenizer {type(self.tokenizer).__name__} cannot encode a completion apart from its prompt "
            "without changing the text; use another"
        )

    def _encode_after(self, anchor: str, texts: list[str]) -> list[list[int] | None]:
        """Encode texts as they are encoded after `anchor`; None where the two merge."""
        if not anchor:
            return list(self.ids(texts))
        head = self.ids([anchor])[0]
        encoded = self.ids([anchor + text for text in texts])
        return [ids[len(head) :] if ids[: len(head)] == head else None for ids in encoded]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _strip_start(text: str, start: str) -> str:
    while text.startswith(start):
        text = text.removeprefix(start)
    return text


def listed(ids: int | list[int] | None) -> list[int]:
    """Ids as generation settings have them: one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def end_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: EOS, and what the tokenizer's chat template writes after a turn, where it serves."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(UserError):
            ends.append(int(TextEncoder(tokenizer).turn_end()[2]))
    return list(dict.fromkeys(ends))
