"""A reward model as a judge of answers: a sequence classifier with one output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dpo.errors import UserError
from dpo.types import Message


def load_reward_model(path: str, device: torch.device) -> Callable[[str | list[Message], str], float]:
    """A function that scores an answer.

    A tokenizer with a chat template gets prompt and answer as a conversation, another one as two texts, prompt first.
    Of what does not fit the model's context the prompt's beginning is left out, lest two answers look the same.

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
    longest = min(_positions(model), tokenizer.model_max_length)
    tokenizer.truncation_side = "left"

    @torch.no_grad()
    def score(prompt: str | list[Message], answer: str) -> float:
        inputs = _inputs(tokenizer, prompt, answer, longest)
        return float(model(**{name: torch.tensor([ids], device=device) for name, ids in inputs.items()}).logits[0, 0])

    return score


def _positions(model: Any) -> int:
    """Tokens that a model has positions for; RoBERTa and its kin count from behind the one of padding."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    of_padding = next((i for table in tables if (i := getattr(table, "padding_idx", None)) is not None), -1)
    return (getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize) - (of_padding + 1)


def _inputs(tokenizer: Any, prompt: str | list[Message], answer: str, longest: int) -> dict[str, list[int]]:
    """All that the model asks for: token ids, and for some which of the two texts they are of."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False)
    else:
        text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
        encoded = tokenizer(text, answer)
        surplus = len(encoded["input_ids"]) - longest
        if 0 < surplus < len(tokenizer(text, add_special_tokens=False)["input_ids"]):
            encoded = tokenizer(text, answer, truncation="only_first", max_length=longest)
    return {name: ids[-longest:] for name, ids in encoded.items()}
