"""PreferenceRow -> prompt, chosen and rejected ids, cut to length; what is odd about a row is noted by kind.

A plain completion ends with the tokenizer's EOS, an answer in a conversation with the template's end-of-turn token,
each exactly once; a completion that was truncated has none. `chat.py` makes texts of conversations, `boundary.py` ids
of texts.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from dpo.data.boundary import TextEncoder
from dpo.data.chat import ChatTemplate
from dpo.data.kinds import CHOSEN_IS_REJECTED, EMPTY_PROMPT, EMPTY_RESPONSE, Problem
from dpo.errors import UserError
from dpo.types import Message, PreferenceRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGER = "longer than max_length"
SAME_AFTER_CUT = "chosen == rejected after truncation"
PROMPT_ALONE = "prompt alone max_length or more"
END_INSIDE = "completion holds the end token"
TEMPLATE = "chat template does not fit"
MERGES = "prompt and completion merge if encoded together"
SPACE_AT_END = "prompt ends with a space"
RUN_TOGETHER = "prompt and completion run together"
UNEVEN_START = "only one completion begins with white space"


@dataclass(slots=True)
class EncodedPair:
    """One row as ids, and what had to be done to it.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: As in `TokenizedPair`; empty where the row is bad.
        problems: Why the row is bad; empty for a good one.
        notes: What is counted though the row is kept.
        prompt_hash: Of the prompt's ids before truncation, 64 bits.
        unscored: Places among prompt + chosen + rejected ids of what others say within a completion.
        prompt_cut: The prompt lost its start.
        completions_cut: Completions (0 to 2) that lost their end, and with it the end token.
    """

    prompt_ids: list[int] = field(default_factory=list)
    chosen_ids: list[int] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)
    unscored: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    prompt_hash: int = 0
    prompt_cut: bool = False
    completions_cut: int = 0

    @property
    def targets(self) -> tuple[int, int]:
        """Scored tokens of chosen and rejected."""
        middle = len(self.prompt_ids) + len(self.chosen_ids)
        of_rejected = sum(place >= middle for place in self.unscored)
        return len(self.chosen_ids) - len(self.unscored) + of_rejected, len(self.rejected_ids) - of_rejected


class PairEncoder:
    """Encode preference rows and cut them to length.

    Truncation of a pair whose prompt + longer completion (end tokens counted) exceed `max_length`: the prompt loses as
    much of its start as is needed, down to `max_prompt_length` tokens, a BOS stays; then each completion loses its end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_prompt_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Probe the tokenizer.

        Args:
            tokenizer: Any Hugging Face tokenizer.
            max_length: Most tokens of a prompt and one completion together, >= 2.
            max_prompt_length: Tokens a prompt may be cut down to, in [1, max_length); None never cuts prompts.
            chat_template_kwargs: Further arguments of the template, under those of a row.
        Raises:
            UserError: An impossible length.
        """
        self._tokenizer, self._text = tokenizer, TextEncoder(tokenizer)
        self._chat = ChatTemplate(tokenizer)
        self._options = dict(chat_template_kwargs or {})
        if max_length < 2:
            raise UserError(f"data.max_length {max_length}: must be 2 or more, for a prompt and a completion")
        if max_prompt_length is not None and not 1 <= max_prompt_length < max_length:
            raise UserError(
                f"data.max_prompt_length {max_prompt_length}: must be at least 1 and less than "
                f"data.max_length {max_length}; null stands for half of it"
            )
        self.max_length, self._max_prompt_length = max_length, max_prompt_length

    def encode_rows(self, rows: list[PreferenceRow]) -> list[EncodedPair]:
        """Encode rows, each plain text or a conversation, in order.

        Raises:
            UserError: The tokenizer or its chat template cannot serve this kind of data at all.
        """
        plain = [row for row in rows if isinstance(row.prompt, str)]
        conversations = [row for row in rows if not isinstance(row.prompt, str)]
        encoded = iter(self._encode_plain(plain) if plain else [])
        rendered = iter(self._encode_conversations(conversations) if conversations else [])
        return [next(encoded if isinstance(row.prompt, str) else rendered) for row in rows]

    def _encode_plain(self, rows: list[PreferenceRow]) -> list[EncodedPair]:
        eos, eos_id = self._tokenizer.eos_token, self._tokenizer.eos_token_id
        if eos is None or eos_id is None:
            raise UserError("the tokenizer has no EOS token, so a completion would have no end: set its eos_token")
        pairs = [EncodedPair() for _ in rows]
        texts = []
        for row, pair in zip(rows, pairs, strict=True):
            for side in ("chosen", "rejected"):
                text = getattr(row, side)
                while text.endswith(eos):
                    text = text.removesuffix(eos)
                texts.append(text)
                if not text and getattr(row, side):
                    pair.problems.append(Problem(EMPTY_RESPONSE, f"{side} is an end token alone"))
                if eos in text:
                    pair.problems.append(Problem(END_INSIDE, f"'{eos}' within {side}"))
        prompts = self._text.encode_plain_prompts([str(row.prompt) for row in rows])
        completions = [[*ids, eos_id] for ids in self._text.encode_completions(texts)]
        self._note_boundaries(pairs, [str(row.prompt) for row in rows], texts)
        for index, pair in enumerate(pairs):
            self._fit(pair, prompts[index], completions[2 * index], completions[2 * index + 1])
        return pairs

    def _note_boundaries(self, pairs: list[EncodedPair], prompts: list[str], texts: list[str]) -> None:
        """Note what is odd where prompt and completion meet; `texts` holds both completions of every pair in turn."""
        merged = self._text.merges([prompt for prompt in prompts for _ in range(2)], texts)
        for index, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
            sides = dict(zip(("chosen", "rejected"), texts[2 * index : 2 * index + 2], strict=True))
            spaced = {side: text[:1].isspace() for side, text in sides.items()}
            if any(merged[2 * index : 2 * index + 2]):
                pair.notes.append(Problem(MERGES, f"{prompt[-8:]!r} and {sides['chosen'][:8]!r}"))
            if prompt[-1:] in (" ", "\t"):
                pair.notes.append(Problem(SPACE_AT_END, f"{prompt[-8:]!r}"))
            elif prompt[-1:].isalnum() and any(text[:1].isalnum() for text in sides.values()):
                pair.notes.append(Problem(RUN_TOGETHER, f"{prompt[-8:]!r} and {sides['chosen'][:8]!r}"))
            if all(sides.values()) and len(set(spaced.values())) > 1:
                pair.notes.append(Problem(UNEVEN_START, next(side for side, space in spaced.items() if space)))

    def _encode_conversations(self, rows: list[PreferenceRow]) -> list[EncodedPair]:
        pairs = [EncodedPair() for _ in rows]
        prompts: list[str] = []
        sides: list[list[str]] = []
        ends: list[int] = []
        self._chat.turn_end(self._options)  # a template that does not serve at all stops here
        for row, pair in zip(rows, pairs, strict=True):
            try:
                prompt, answers, end_id = self._rendered(row)
            except UserError as error:
                pair.problems.append(Problem(TEMPLATE, str(error)))
                prompt, answers, end_id = "", [[], []], -1
            prompts.append(prompt)
            ends.append(end_id)
            sides += answers
        texts = [text for side in sides for text in side]
        tails = [tail for i, side in enumerate(sides) for tail in self._text.tails_of(prompts[i // 2], side)]
        encoded = iter(self._text.encode_completions(texts, tails))
        pieces = [[next(encoded) for _ in side] for side in sides]
        prompt_ids = self._text.ids(prompts)
        for index, pair in enumerate(pairs):
            if not pair.problems:
                self._join(pair, prompt_ids[index], pieces[2 * index], pieces[2 * index + 1], ends[index])
        return pairs

    def _rendered(self, row: PreferenceRow) -> tuple[str, list[list[str]], int]:
        """Prompt, both answers as `ChatTemplate.render_answer` cuts them, and the id that ends a turn."""
        messages = cast(list[Message], row.prompt)
        options = self._options | (row.chat_template_kwargs or {}) | ({"tools": row.tools} if row.tools else {})
        end_id = self._chat.turn_end(options)[2]
        prompt = self._chat.render(messages, answer_next=True, options=options)
        sides = cast(list[list[Message]], [row.chosen, row.rejected])
        for read in [messages, *([*messages, *side[:-1]] for side in sides if len(side) > 1)]:
            rendered = prompt if read is messages else self._chat.render(read, answer_next=True, options=options)
            if (unread := self._chat.unread(read, rendered, options)) is not None:
                raise UserError(f"the chat template (model.chat_template) leaves out {unread}")
        return prompt, [self._chat.render_answer(messages, side, prompt, options) for side in sides], end_id

    def _join(
        self, pair: EncodedPair, prompt: list[int], chosen: list[list[int]], rejected: list[list[int]], end_id: int
    ) -> None:
        """Write a pair of the pieces of its answers, every second of which is not the assistant's."""
        for side, pieces in (("chosen", chosen), ("rejected", rejected)):
            if any(end_id in ids[:-1] for ids in pieces[::2]):
                pair.problems.append(Problem(END_INSIDE, f"the end-of-turn token within {side}"))
        self._fit(pair, prompt, list(chain(*chosen)), list(chain(*rejected)))
        if len(chosen) + len(rejected) > 2:
            own = [[place % 2 == 0 for place, ids in enumerate(side) for _ in ids] for side in (chosen, rejected)]
            own = [[True] * len(pair.prompt_ids), own[0][: len(pair.chosen_ids)], own[1][: len(pair.rejected_ids)]]
            pair.unscored = [place for place, is_own in enumerate(chain(*own)) if not is_own]
            answers = zip((pair.chosen_ids, pair.rejected_ids), own[1:], strict=True)
            scored = [[i for i, is_own in zip(ids, kept, strict=True) if is_own] for ids, kept in answers]
            if scored[0] == scored[1] and not pair.problems:
                kind = SAME_AFTER_CUT if pair.completions_cut else CHOSEN_IS_REJECTED
                pair.problems.append(Problem(kind, "the assistant says the same on both sides"))

    def _fit(self, pair: EncodedPair, prompt: list[int], chosen: list[int], rejected: list[int]) -> None:
        """Cut a pair to length, write its ids into `pair` and note what was done."""
        limit, longer = self.max_length, max(len(chosen), len(rejected))
        if not prompt:
            pair.problems.append(Problem(EMPTY_PROMPT, "the prompt has no tokens"))
        if len(prompt) + longer > limit:
            pair.notes.append(Problem(LONGER, f"{len(prompt) + longer} tokens, data.max_length is {limit}"))
        if len(prompt) >= limit:
            where = pair.problems if self._max_prompt_length is None else pair.notes
            where.append(Problem(PROMPT_ALONE, f"the prompt has {len(prompt)} tokens, data.max_length is {limit}"))
        if pair.problems:
            return
        digest = hashlib.blake2b(array("i", prompt).tobytes(), digest_size=8).digest()
        pair.prompt_hash = int.from_bytes(digest, "little")
        if self._max_prompt_length is not None:
            keep = max(self._max_prompt_length, limit - longer)
            pair.prompt_cut = len(prompt) > keep
            prompt = self._cut_start(prompt, keep)
        room = limit - len(prompt)
        if chosen[:room] == rejected[:room]:
            same = Problem(CHOSEN_IS_REJECTED, "both sides have the same tokens")
            cut = Problem(SAME_AFTER_CUT, f"they differ beyond data.max_length {limit} alone")
            pair.problems.append(same if chosen == rejected else cut)
            return
        pair.completions_cut = (len(chosen) > room) + (len(rejected) > room)
        pair.prompt_ids, pair.chosen_ids, pair.rejected_ids = prompt, chosen[:room], rejected[:room]

    def _cut_start(self, ids: list[int], keep: int) -> list[int]:
        if len(ids) <= keep:
            return ids
        if keep > 1 and ids[0] == self._tokenizer.bos_token_id:
            return [ids[0], *ids[len(ids) - keep + 1 :]]
        return ids[len(ids) - keep :]
