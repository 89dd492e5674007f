"""Tiny random models and pairs for tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from dpo.types import TokenizedPair

VOCAB = 61
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, dropout: float = 0.0, **changes: Any) -> Any:
    """A 2-layer random model of a family with visible differences between tokens."""
    torch.manual_seed(seed)
    common: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, attention_dropout=dropout,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=0,
        )
    elif family == "llama":
        config = transformers.LlamaConfig(**common | changes)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**common | changes)
    elif family == "qwen3":
        config = transformers.Qwen3Config(**common | {"head_dim": 8} | changes)
    elif family == "gemma2":
        config = transformers.Gemma2Config(
            **common | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0} | changes
        )
    elif family == "cohere":
        config = transformers.CohereConfig(**common | {"logit_scale": 0.25} | changes)
    elif family == "granite":
        config = transformers.GraniteConfig(**common | {"logits_scaling": 8.0} | changes)
    elif family == "mistral":
        config = transformers.MistralConfig(**common | changes)
    elif family == "bloom":
        config = transformers.BloomConfig(
            vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, hidden_dropout=dropout,
            attention_dropout=dropout,
        )
    elif family == "mamba":
        config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    else:
        raise KeyError(family)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if dtype == torch.float64:
        for module in made.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_rms_norm, module)
    return made


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What transformers' RMSNorm computes, in fp64: its own rounds to fp32 on the way."""
    scaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (module.weight + type(module).__name__.startswith("Gemma")) * scaled


def pairs(
    count: int, seed: int = 0, longest: int = 12, vocab: int = VOCAB, *, all_scored: bool = False
) -> list[TokenizedPair]:
    """Pairs of random ids and lengths, one-token prompts and completions among them; of every third pair some
    tokens are not scored."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(1, vocab, length).astype(np.int32)

    made = []
    for i in range(count):
        prompt, chosen, rejected = (1, 1, 1) if i == 0 else rng.integers(1, longest + 1, 3)
        scored = [_some(rng, int(length)) if i % 3 == 2 and not all_scored else None for length in (chosen, rejected)]
        made.append(TokenizedPair(i, ids(int(prompt)), ids(int(chosen)), ids(int(rejected)), math.nan, *scored))
    return made


def _some(rng: np.random.Generator, length: int) -> np.ndarray:
    """Which tokens of a completion are scored: the first, and about half of the others."""
    return np.concatenate(([True], rng.random(length - 1) < 0.5))


class Pairs:
    """A list of pairs as a data set."""

    def __init__(self, items: Sequence[TokenizedPair]) -> None:
        self.items = list(items)
        self.lengths = np.array(
            [[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in items], dtype=np.int64
        )
        self.targets = np.array([p.targets for p in items], dtype=np.int64)
        self.row_numbers = np.arange(1, len(items) + 1)
        self.tokens = np.concatenate([ids for p in items for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)])
        scored = [
            np.ones(len(ids), dtype=bool) if mask is None else mask
            for p in items
            for ids, mask in ((p.prompt_ids, None), *p.completions)
        ]
        self.unscored = np.flatnonzero(~np.concatenate(scored))

    @property
    def parts(self) -> list[Pairs]:
        return [self]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, pair_id: int) -> TokenizedPair:
        return self.items[pair_id]


def saved(folder: Path, family: str, tokenizer: Path | None = None, **kwargs: Any) -> Path:
    """A model folder in Hugging Face form."""
    model(family, dtype=torch.float32, **kwargs).save_pretrained(folder)
    if tokenizer is not None:
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
