"""The work that every system gets: a random-init model in a folder, rows drawn from the data, their token ids."""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.clock import Job
from dpo.config import Source
from dpo.data.sources import load_source
from dpo.data.tokenize import prepare_pairs
from dpo.model.load import load_tokenizer

VERSIONS = ("torch", "transformers", "deepspeed", "trl", "datasets")


@dataclass(frozen=True)
class Size:
    """How much work.

    Attributes:
        layers, heads, width: Of the model.
        max_length: Longest prompt + completion, tokens.
        pairs: Per optimizer step.
        warmup, steps: Optimizer steps before the clock starts, and under it.
        rounds: Fresh processes per system.
        sweep_steps: Optimizer steps per combination of TRL's options that is tried.
        plain_micro_batch: Pairs per forward pass of the plain loop, whose logits are the largest.
        lr: Large enough for losses to leave ln 2 within the timed steps: before that, equal losses prove nothing.
        family: gpt2, or llama with a quarter of the heads for keys, and head and embedding tied.
        vocabulary: Tokens of the model, if more than the tokenizer's.
    """

    layers: int
    heads: int
    width: int
    max_length: int
    pairs: int
    warmup: int
    steps: int
    rounds: int
    sweep_steps: int
    plain_micro_batch: int
    lr: float
    family: Literal["gpt2", "llama"] = "gpt2"
    vocabulary: int = 0


SIZES = {
    "cpu": Size(
        6, 8, 512, max_length=512, pairs=8, warmup=1, steps=3, rounds=3, sweep_steps=1, plain_micro_batch=8, lr=1e-4
    ),
    "cuda": Size(
        12, 12, 768, max_length=1024, pairs=64, warmup=15, steps=50, rounds=3, sweep_steps=5, plain_micro_batch=8,
        lr=1e-5,
    ),
    "llama_1b": Size(
        16, 32, 2048, max_length=1024, pairs=64, warmup=5, steps=20, rounds=3, sweep_steps=2, plain_micro_batch=8,
        lr=1e-5, family="llama", vocabulary=128_256,
    ),
    "quick": Size(
        2, 2, 32, max_length=128, pairs=4, warmup=1, steps=2, rounds=1, sweep_steps=1, plain_micro_batch=4, lr=1e-2
    ),
}


def add_rows(parser: ArgumentParser) -> None:
    """Flags that say which rows are trained on."""
    add = parser.add_argument
    add("--data", required=True, help="preference rows in any form that train_dpo.py reads")
    add("--split", default="train", help="split of the data, where it has splits")
    add("--tokenizer", required=True, help="folder, hub id, or builtin:tiny; its size is the model's vocabulary")


def add_work(parser: ArgumentParser) -> None:
    """Flags that say what is done with them, and on what."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the products; master weights are fp32")
    add("--size", choices=("quick", "llama_1b"), help="quick: whether it works, not how fast it is; default: by device")
    add("--threads", type=int, default=2, help="of every process")
    add("--seed", type=int, default=0, help="decides the weights and which rows are drawn")


@dataclass(frozen=True)
class Workload:
    """The work, built.

    Attributes:
        job: Without folder and options.
        lengths: (n, 3) int64: prompt, chosen, rejected tokens of every pair, in the order of training.
        useful_tokens: 2P+C+R over the timed pairs.
        model_flops: Of the timed pairs, policy alone; see `flops`.
        parameters: Of the policy.
    """

    job: Job
    lengths: np.ndarray
    useful_tokens: int
    model_flops: float
    parameters: int


def build(folder: Path, size: Size, *, data: str, split: str, tokenizer: str, seed: int, **settings: Any) -> Workload:
    """Write model, rows and token ids.

    Args:
        folder: Empty.
        size: How much.
        data, split: Preference data in any form that the suite reads.
        tokenizer: Folder, hub id or builtin:tiny; its size is the model's vocabulary.
        seed: Decides the weights and which rows are drawn.
        settings: dtype, device, beta of the Job.
    Returns:
        The work.
    """
    loaded = load_tokenizer(tokenizer)
    needed = (size.warmup + size.steps) * size.pairs
    kept = _draw_rows(folder / "rows.jsonl", loaded, size, data, split, seed, needed, folder / "cache")
    pairs, _ = prepare_pairs(
        Source(path=str(kept)), loaded, max_length=size.max_length, max_prompt_length=size.max_length // 2,
        cache_dir=folder / "cache",
    )  # fmt: skip
    assert len(pairs) == needed, f"{len(pairs)} pairs of {needed} rows"
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [{name: getattr(pairs[i], name).tolist() for name in names} for i in range(needed)]
    (folder / "pairs.json").write_text(json.dumps(ids))
    body, parameters = write_model(folder / "policy", loaded, size, seed)
    timed = pairs.lengths[size.warmup * size.pairs :]
    job = Job(
        policy=str(folder / "policy"), rows=str(kept), pairs=str(folder / "pairs.json"),
        token_cache=str(folder / "cache"), folder="", max_length=size.max_length, batch=size.pairs,
        warmup=size.warmup, steps=size.steps, lr=size.lr, **settings,
    )
    vocabulary = max(size.vocabulary, len(loaded))
    return Workload(
        job, pairs.lengths, useful_tokens(timed), flops(timed, body, size.layers, size.width, vocabulary), parameters
    )


def _draw_rows(
    path: Path, tokenizer: Any, size: Size, data: str, split: str, seed: int, needed: int, cache: Path
) -> Path:
    """Rows of a random order of the data, as many as there are pairs to train on, all of them usable."""
    rows = load_source(Source(path=data, split=split))
    order = np.random.default_rng(seed).permutation(len(rows))[: needed + needed // 4 + 8]
    drawn = [json.dumps(rows[int(i)], ensure_ascii=False, default=str) + "\n" for i in order]
    candidates = path.with_name("candidates.jsonl")
    candidates.write_text("".join(drawn), encoding="utf-8")
    usable, _ = prepare_pairs(
        Source(path=str(candidates)), tokenizer, max_length=size.max_length, max_prompt_length=size.max_length // 2,
        on_bad_row="skip", cache_dir=cache,
    )
    if len(usable) < needed:
        raise SystemExit(f"{data}: {len(usable)} usable rows, {needed} are needed; use fewer --steps")
    path.write_text("".join(drawn[int(number) - 1] for number in usable.row_numbers[:needed]), encoding="utf-8")
    return path


def write_model(folder: Path, tokenizer: Any, size: Size, seed: int) -> tuple[int, int]:
    """A random model without dropout; its parameters without embeddings, and all of them.

    The weights are rounded to bf16 and stored in fp32, so that a system which loads bf16 starts from the same numbers.
    """
    disable_progress_bar()
    torch.manual_seed(seed)
    model = (_gpt2 if size.family == "gpt2" else _llama)(tokenizer, size)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters - embeddings, parameters


def _gpt2(tokenizer: Any, size: Size) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=max(size.vocabulary, len(tokenizer)), n_positions=size.max_length, n_embd=size.width,
            n_layer=size.layers, n_head=size.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def _llama(tokenizer: Any, size: Size) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(size.vocabulary, len(tokenizer)), max_position_embeddings=size.max_length,
            hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=max(1, size.heads // 4), tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def machine(device: str) -> str:
    """Name of the hardware."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def describe(size: Size, work: Workload) -> str:
    """Model and pairs in words."""
    p, c, r = work.lengths.mean(axis=0)
    return (
        f"{'GPT-2' if size.family == 'gpt2' else 'Llama'} of {size.layers} layers x {size.width},"
        f" {work.parameters / 1e6:.1f}M parameters, random; max_length {size.max_length}; {size.pairs} pairs a step of"
        f" {p:.0f} prompt, {c:.0f} chosen and {r:.0f} rejected tokens on average"
    )


def useful_tokens(lengths: np.ndarray) -> int:
    """2P+C+R, summed: what every system is credited with, padding and shared prompts alike invisible."""
    return int(2 * lengths[:, 0].sum() + lengths[:, 1:].sum())


def flops(lengths: np.ndarray, body: int, layers: int, width: int, vocabulary: int) -> float:
    """Floating-point operations that a DPO step needs of the policy, forward and backward.

        6 N_body (P+C+R) + 6 H V (C+R) + 12 H L (query-key pairs of the shared layout)

    Prompts count once; reference, recomputation, padding and twice-computed prompts do not count.

    Args:
        lengths: (n, 3): P, C, R of every pair.
        body: Parameters without embeddings.
        layers, width, vocabulary: L, H, V.
    """
    p, c, r = lengths.T.astype(float)
    attended = (p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2
    per_pair = 6 * body * (p + c + r) + 6 * width * vocabulary * (c + r) + 12 * width * layers * attended
    return float(per_pair.sum())


def versions() -> dict[str, str]:
    """Installed versions of what is measured."""
    found = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
