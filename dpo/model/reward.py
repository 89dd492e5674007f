"""A reward model as a judge of answers: a sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dpo.errors import UserError
from dpo.types import Message


def load_reward_model(path: str, device: torch.device) -> Callable[[str | list[Message], str], float]:
    """A function that scores an answer.

    A tokenizer with a chat template gets prompt and answer as a conversation, another one as two texts, prompt first.
    What does not fit the model's context loses its beginning, lest two answers to a long prompt look the same.

    Args:
        path: Folder or hub id of an AutoModelForSequenceClassification with one label.
        device: Where it computes, one answer at a time, so that no padding token is needed.
    Returns:
        score(prompt, answer) -> reward.
    Raises:
        UserError: It cannot be loaded, or has another number of outputs.
    """
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path).eval().to(device)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--judge reward:{path}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if model.config.num_labels != 1:
        raise UserError(f"--judge reward:{path}: has {model.config.num_labels} outputs; use a reward model, with one")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    tokenizer.truncation_side = "left"

    @torch.no_grad()
    def score(prompt: str | list[Message], answer: str) -> float:
        ids = _ids(tokenizer, prompt, answer, longest)
        return float(model(input_ids=torch.tensor([ids], device=device)).logits[0, 0])

    return score


def _ids(tokenizer: Any, prompt: str | list[Message], answer: str, longest: int) -> Sequence[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"][-longest:]
    text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
    return tokenizer(text, answer, truncation="longest_first", max_length=longest)["input_ids"]
