"""Text -> token ids, exact at the boundary of prompt and completion.

The prompt is encoded alone, so it is token for token what the model reads at inference; the completion is encoded
without the space that SentencePiece-like tokenizers put before a text, so prompt ids + completion ids decode to
prompt + completion. Ids are joined, never texts: nothing merges across, and nothing is ever read from a pad id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from dpo.data.chat import ChatTemplate, special_tokens
from dpo.errors import UserError
from dpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("", "\n", ":", "a", "=")
_PROBES = ("Hello", " Hello", "\n\nHi", "  two", "\u00e9t\u00e9", "1")
_WINDOW = 24
"""Characters on either side of the boundary that are looked at for merges."""
_TAIL = 256
"""Characters at the end of a rendered prompt among which its last special token is looked for."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    *,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode a prompt as the model sees it, in training and at inference.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        prompt: Plain text (the tokenizer's BOS is added if it adds one), or messages (rendered with the generation
            prompt; the chat template alone decides on a BOS).
        template_options: Further arguments of the template, `tools` among them.
    Returns:
        Token ids, not truncated: at most one BOS, no EOS at the end.
    Raises:
        UserError: Messages, and no chat template or one that refuses them.
    """
    encoder = TextEncoder(tokenizer)
    if isinstance(prompt, str):
        return encoder.encode_plain_prompts([prompt])[0]
    rendered = ChatTemplate(tokenizer).render(prompt, answer_next=True, options=template_options)
    return encoder.ids([rendered])[0]


class TextEncoder:
    """Encode prompts and completions with one tokenizer, knowing what it puts around a text by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        bare, dressed = self.ids(["a"])[0], self.ids(["a"], special=True)[0]
        start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        self._num_after = len(dressed) - start - len(bare)
        self._anchor: str | None = None
        self._specials = special_tokens(tokenizer)
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

    def tail_of(self, rendered: str) -> str:
        """Cut a rendered text down to what stands from its last special token on; "" where it has none."""
        end = rendered[-_TAIL:]
        start = max((end.rfind(token) for token in self._specials), default=-1)
        return "" if start < 0 else end[start:]

    def tails_of(self, prompt: str, pieces: list[str]) -> list[str]:
        """What `tail_of` says before each of the pieces that follow a rendered prompt."""
        tails, text = [], prompt
        for piece in pieces:
            tails.append(self.tail_of(text))
            text = (text + piece)[-_TAIL:]
        return tails

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
