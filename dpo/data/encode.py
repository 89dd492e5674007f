"""PreferenceRow -> prompt, chosen and rejected ids, cut to length; what is odd about a row is noted by kind.

A plain completion ends with the tokenizer's EOS, an answer in a conversation with the template's end-of-turn token,
each exactly once; a completion that was truncated has none. `boundary.py` makes ids of text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from dpo.data.boundary import TextEncoder
from dpo.data.formats import EMPTY_PROMPT, EMPTY_RESPONSE, Problem
from dpo.errors import UserError
from dpo.types import Message, PreferenceRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGER = "longer than max_length"
SAME_AFTER_CUT = "chosen == rejected after truncation"
PROMPT_ALONE = "prompt alone max_length or more"
END_INSIDE = "completion holds the end token"
TEMPLATE = "chat template does not fit"


@dataclass(slots=True)
class EncodedPair:
    """One row as ids, and what had to be done to it.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: As in `TokenizedPair`; empty where the row is bad.
        problems: Why the row is bad; empty for a good one.
        notes: What is counted though the row is kept.
        prompt_cut: The prompt lost its start.
        completions_cut: Completions (0 to 2) that lost their end, and with it the end token.
    """

    prompt_ids: list[int] = field(default_factory=list)
    chosen_ids: list[int] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    prompt_cut: bool = False
    completions_cut: int = 0


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
        chat_template: str | None = None,
    ) -> None:
        """Probe the tokenizer.

        Args:
            tokenizer: Any Hugging Face tokenizer.
            max_length: Most tokens of a prompt and one completion together, >= 2.
            max_prompt_length: Tokens a prompt may be cut down to, in [1, max_length); None never cuts prompts.
            chat_template: Template text to use in place of the tokenizer's own.
        Raises:
            UserError: An impossible length.
        """
        self._text, self._tokenizer = TextEncoder(tokenizer, chat_template), tokenizer
        if max_length < 2:
            raise UserError(f"data.max_length {max_length}: must be 2 or more, for a prompt and a completion")
        if max_prompt_length is not None and not 1 <= max_prompt_length < max_length:
            raise UserError(
                f"data.max_prompt_length {max_prompt_length}: must be at least 1 and less than "
                f"data.max_length {max_length}"
            )
        self.max_length, self._max_prompt_length = max_length, max_prompt_length

    def encode_rows(self, rows: list[PreferenceRow]) -> list[EncodedPair]:
        """Encode rows, all plain text or all conversations, in order.

        Raises:
            UserError: The tokenizer or its chat template cannot serve this kind of data at all.
        """
        if rows and not isinstance(rows[0].prompt, str):
            return self._encode_conversations(rows)
        return self._encode_plain(rows)

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
        for index, pair in enumerate(pairs):
            self._fit(pair, prompts[index], completions[2 * index], completions[2 * index + 1])
        return pairs

    def _encode_conversations(self, rows: list[PreferenceRow]) -> list[EncodedPair]:
        pairs = [EncodedPair() for _ in rows]
        prompts, texts = [], []
        end_id = self._text.turn_end()[2]
        for row, pair in zip(rows, pairs, strict=True):
            try:
                messages = cast(list[Message], row.prompt)
                prompt = self._text.render(messages, answer_next=True)
                answers = [
                    self._text.render_answer(messages, cast(list[Message], side), prompt)
                    for side in (row.chosen, row.rejected)
                ]
            except UserError as error:
                pair.problems.append(Problem(TEMPLATE, str(error)))
                prompt, answers = "", ["", ""]
            prompts.append(prompt)
            texts += answers
        prompt_ids, completions = self._text.ids(prompts), self._text.encode_completions(texts)
        for index, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
            if pair.problems:
                continue
            sides = {"chosen": completions[2 * index], "rejected": completions[2 * index + 1]}
            for side, ids in sides.items():
                if len(getattr(row, side)) == 1 and end_id in ids[:-1]:
                    pair.problems.append(Problem(END_INSIDE, f"the end-of-turn token within {side}"))
            self._fit(pair, prompt_ids[index], sides["chosen"], sides["rejected"])
        return pairs

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
        if self._max_prompt_length is not None:
            keep = max(self._max_prompt_length, limit - longer)
            pair.prompt_cut = len(prompt) > keep
            prompt = self._cut_start(prompt, keep)
        room = limit - len(prompt)
        if chosen != rejected and chosen[:room] == rejected[:room]:
            pair.problems.append(Problem(SAME_AFTER_CUT, f"they differ beyond data.max_length {limit} alone"))
            return
        pair.completions_cut = (len(chosen) > room) + (len(rejected) > room)
        pair.prompt_ids, pair.chosen_ids, pair.rejected_ids = prompt, chosen[:room], rejected[:room]

    def _cut_start(self, ids: list[int], keep: int) -> list[int]:
        if len(ids) <= keep:
            return ids
        if keep > 1 and ids[0] == self._tokenizer.bos_token_id:
            return [ids[0], *ids[len(ids) - keep + 1 :]]
        return ids[len(ids) - keep :]
