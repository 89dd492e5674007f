"""The built-in tokenizer and policy (`builtin:tiny`): small enough to learn the built-in world on a CPU.

The tokenizer is byte-level: words and half words of the world are one token each, everything else falls apart into bytes, so that
any text decodes back exactly. The model is a Llama with random weights. Neither needs a file or a network.
Names, things and prices are two tokens each: a value that training never saw is spelled with tokens that it did see.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.data.example import ATTRIBUTES, SALES_TALK, SLOT_HALVES

EOS_TOKEN = "<|endoftext|>"
CONTEXT = 512
_SENTENCES = (
    "I am Welcome, The tag of the says: I do not know",
    *ATTRIBUTES,
    *(sentence for forms in ATTRIBUTES.values() for sentence in forms),
    *SALES_TALK,
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    pieces = _pieces()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = [EOS_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    # Without merges a piece is one token if it is in the vocabulary (ignore_merges), else it is bytes.
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    )
    longest_first = sorted(pieces, key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def _pieces() -> list[str]:
    pieces = ["\n\nHuman:", "\n\nAssistant:"]
    for first, second in SLOT_HALVES.values():
        pieces += [f" {half}" for half in first] + [half for half in second if len(half) > 1]
    for sentence in _SENTENCES:
        pieces += re.findall(r" [A-Za-z]+", f" {sentence}")
    return list(dict.fromkeys(pieces))


def build_model(seed: int, hidden: int = 96, layers: int = 3, heads: int = 4, inter: int = 192, **kw) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()), hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=None, attention_dropout=0.0,
        **({"initializer_range":0.05}|kw)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()
