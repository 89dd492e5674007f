"""Answers of the reference and of the policy to the same prompts, side by side, and how likely both find them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.data import example
from dpo.data.batch import collate
from dpo.data.chat import end_ids, listed
from dpo.data.planner import Layout, plan_batch
from dpo.model.blocks import uncompiled
from dpo.model.forward import Scorer, pair_logps
from dpo.model.load import context_length
from dpo.runtime.engine import is_sharded
from dpo.runtime.files import read_records, write_records
from dpo.types import PackedBatch, TokenizedPair

SCORED_TOKENS = 4096
"""Tokens of a forward pass that scores answers."""


@contextmanager
def _generating(scorer: Scorer, settings: Any) -> Iterator[None]:
    """The model's own attention, layers that may keep a cache although checkpointing marks them as training, no
    compiled code, and none of the model's own settings, such as a penalty on repetition: it answers as it is scored."""
    training = [module for module in scorer.model.modules() if module.training]
    for module in training:
        module.training = False
    own, scorer.model.generation_config = scorer.model.generation_config, settings
    try:
        with scorer.own_attention(), uncompiled(scorer):
            yield
    finally:
        scorer.model.generation_config = own
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    Attributes:
        max_tokens: Longest answer; at most half of the model's context.
        temperature: 0 is greedy; 1 draws from the model as it is.
        top_p: Only the likeliest tokens that hold this share together are drawn from; 1: all.
        seed: Of the draws.
        batch_size: Prompts answered at once.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt.

    Attributes:
        text: Without special tokens.
        prompt_ids: (p,) int32: the prompt as the model saw it.
        ids: (c,) int32, c >= 1, the end token included where the model gave one.
    """

    text: str
    prompt_ids: np.ndarray
    ids: np.ndarray


@torch.no_grad()
def answers_to(
    prompts: Sequence[Sequence[int]], scorer: Scorer, tokenizer: Any, decoding: Decoding, device: torch.device
) -> list[Answer]:
    """Complete token-id prompts, in batches padded on the left.

    Args:
        prompts: Token ids, as in training; what does not fit the model's context beside the answer loses its start.
        scorer: Around the model; collective under ZeRO-3, where every rank gives the same prompts.
        tokenizer: Of the model.
        decoding: How.
        device: Of the model.
    Returns:
        One answer per prompt. The random state outside is left as it was.
    """
    context = context_length(scorer.model.config)
    max_tokens = decoding.max_tokens
    if context is not None:
        max_tokens = min(max_tokens, context // 2)
        prompts = [_last_tokens(prompt, context - max_tokens, tokenizer.bos_token_id) for prompt in prompts]
    how: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        how = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    stops = sorted({*listed(scorer.model.generation_config.eos_token_id), *end_ids(tokenizer)})
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *stops, 0) if i is not None)
    plain = type(scorer.model.generation_config)
    settings = plain(max_new_tokens=max_tokens, pad_token_id=pad, eos_token_id=stops or None, **how)
    ends = torch.tensor(stops, device=device)
    answers: list[Answer] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _generating(scorer, settings):
        torch.manual_seed(decoding.seed)
        for start in range(0, len(prompts), decoding.batch_size):
            chunk = prompts[start : start + decoding.batch_size]
            ids, mask = _padded_left(chunk, pad, device)
            made = scorer.model.generate(
                input_ids=ids, attention_mask=mask, synced_gpus=is_sharded(scorer)
            )[:, ids.shape[1] :]
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            for text, prompt, row in zip(texts, chunk, made, strict=True):
                ended = torch.isin(row, ends).nonzero()
                kept = row[: int(ended[0]) + 1] if len(ended) else row
                answers.append(Answer(text, np.array(prompt, dtype=np.int32), kept.cpu().numpy().astype(np.int32)))
    return answers


def _padded_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, (prompts, longest) int64 each."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt), device=device)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@torch.no_grad()
def answer_logps(
    score: Callable[[PackedBatch], Tensor],
    of_policy: Sequence[Answer],
    of_reference: Sequence[Answer],
    layout: Layout,
    device: torch.device,
) -> np.ndarray:
    """Log-probs under one model of the answers of both.

    Args:
        score: A Scorer, or an engine around one; collective under ZeRO-3.
        of_policy, of_reference: Answers to the same prompts.
        layout: One that is exact for the model.
        device: Of the model.
    Returns:
        (n, 2) fp64: summed log-probs of the policy's and of the reference's answers, nats.
    """
    pairs = [
        TokenizedPair(index, new.prompt_ids, new.ids, old.ids)
        for index, (new, old) in enumerate(zip(of_policy, of_reference, strict=True))
    ]
    lengths = np.array([[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
    (plan,) = plan_batch(range(len(pairs)), lengths, world_size=1, token_budget=SCORED_TOKENS, layout=layout)
    found = np.zeros((len(pairs), 2))
    for ids in plan:
        logps = pair_logps(score, collate([pairs[i] for i in ids], layout).to(device))
        found[ids] = torch.stack((logps.chosen, logps.rejected), dim=1).double().cpu().numpy()
    return found


def _last_tokens(prompt: Sequence[int], room: int, bos: int | None) -> Sequence[int]:
    """The end of a prompt that is longer than the room; a BOS stays at its start."""
    if len(prompt) <= room:
        return prompt
    return [prompt[0], *prompt[len(prompt) - room + 1 :]] if prompt[0] == bos else prompt[-room:]


def write_samples(run: Path, step: int, rows: Sequence[dict[str, str]]) -> None:
    """Add the answers after a step to samples.jsonl, in place of older ones of the same step.

    Args:
        run: The run directory.
        step: Optimizer steps done.
        rows: prompt, reference, policy, and the data's chosen answer.
    """
    path = run / "samples.jsonl"
    kept = [row for row in read_records(path)[0] if row["step"] < step]
    write_records(path, [*kept, *({"step": step} | row for row in rows)])


def side_by_side(prompt: str, reference: str, policy: str) -> str:
    """A prompt and both answers for a terminal; runs of line breaks, which some policies end in, are two."""
    texts = (re.sub(r"(\s*\n){3,}", "\n\n", text) for text in (prompt.strip(), reference, policy))
    return "\nprompt:    {}\nreference: {}\npolicy:    {}".format(*texts)


def world_rewards(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Ground-truth rewards of answers to prompts of the built-in world.

    Args:
        rows: As in `write_samples`; at least two.
    Returns:
        `reference` and `policy`: mean rewards; `parsed`: share of policy answers that are sentences of the world;
        `p`: one-sided p-value of a paired test that the policy's are higher, a normal approximation; NaN below 30 rows.
    """
    before = [example.reward(row["prompt"], row["reference"]) for row in rows]
    after = [example.reward(row["prompt"], row["policy"]) for row in rows]
    gains = [b - a for a, b in zip(before, after, strict=True)]
    spread = statistics.stdev(gains) / math.sqrt(len(gains))
    mean = statistics.fmean(gains)
    z = mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return {
        "reference": statistics.fmean(before),
        "policy": statistics.fmean(after),
        "parsed": statistics.fmean(float(example.parses(row["policy"])) for row in rows),
        "p": 1 - statistics.NormalDist().cdf(z) if len(rows) >= 30 else math.nan,
    }
