"""Answers of the reference and of the policy to the same prompts, side by side."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpo.data import example
from dpo.model.forward import Scorer
from dpo.model.load import context_length
from dpo.runtime.checkpoint import write_whole
from dpo.runtime.engine import is_sharded


@contextmanager
def _generating(scorer: Scorer) -> Iterator[None]:
    """The model's own attention, and layers that may keep a cache although checkpointing marks them as training."""
    training = [module for module in scorer.model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with scorer.own_attention():
            yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def greedy_answers(
    scorer: Scorer, tokenizer: Any, prompts: Sequence[Sequence[int]], max_tokens: int, device: torch.device
) -> list[str]:
    """Greedy completions of token-id prompts, in batches padded on the left.

    Args:
        scorer: Around the model; collective under ZeRO-3, where every rank gives the same prompts.
        tokenizer: Of the model.
        prompts: Token ids, as in training; what does not fit the model's context beside the answer loses its start.
        max_tokens: Longest answer; at most half of the context.
        device: Of the model.
    Returns:
        One text per prompt, without special tokens.
    """
    context = context_length(scorer.model.config)
    if context is not None:
        max_tokens = min(max_tokens, context // 2)
        prompts = [_last_tokens(prompt, context - max_tokens, tokenizer.bos_token_id) for prompt in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers: list[str] = []
    for start in range(0, len(prompts), 32):
        chunk = prompts[start : start + 32]
        width = max(len(p) for p in chunk)
        ids = torch.full((len(chunk), width), pad, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(chunk):
            ids[row, width - len(prompt) :] = torch.as_tensor(list(prompt), device=device)
            mask[row, width - len(prompt) :] = 1
        with _generating(scorer):
            made = scorer.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad,
                temperature=None, top_p=None, top_k=None, synced_gpus=is_sharded(scorer),
            )
        answers += tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    return answers


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
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in old if json.loads(line)["step"] < step]
    lines = kept + [json.dumps({"step": step} | row, ensure_ascii=False) for row in rows]
    write_whole(path, "".join(line + "\n" for line in lines))


def world_rewards(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Ground-truth rewards of answers to prompts of the built-in world.

    Args:
        rows: As in `write_samples`; at least two.
    Returns:
        `reference` and `policy`: mean rewards; `parsed`: share of policy answers that are sentences of the world;
        `p`: one-sided p-value of a paired test that the policy's are higher (normal approximation).
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
        "p": 1 - statistics.NormalDist().cdf(z),
    }
