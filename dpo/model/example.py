"""The built-in tokenizer and policy (`builtin:tiny`): small enough to learn the built-in world on a CPU.

The tokenizer is byte-level: words and half words of the world are one token each, all other text falls apart into
bytes, so that anything decodes back exactly. The model is a Llama with random weights. Neither needs a file or network.
Names, things, prices, makers and towns are two tokens each: a value that training never saw is spelled with tokens that
it did see, so that what has to be learned is to copy.
"""

from __future__ import annotations

import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.data.example import ATTRIBUTES, SALES_TALK, SLOT_HALVES

EOS_TOKEN = "<|endoftext|>"
CONTEXT = 512

_TURNS = ("\n\nHuman:", "\n\nAssistant:")
_SENTENCES = (
    "I am Welcome, The tag of the says: I do not know",
    *ATTRIBUTES,
    *(sentence for forms in ATTRIBUTES.values() for sentence in forms),
    *SALES_TALK,
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the world's words.

    Returns:
        A tokenizer of some 450 tokens: the end token (id 0), the 256 bytes, the pieces of the world. It adds no token
        by itself, has no pad token, and no token spans the boundary between "\\n\\nAssistant:" and what follows.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = _pieces()
    vocabulary = [EOS_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    # Without merges a piece is one token if the vocabulary has it (ignore_merges), else it is bytes.
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    )
    longest_first = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(longest_first), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Build the tiny policy with random weights.

    Args:
        seed: Decides every weight; the global random state is left as it was.
    Returns:
        A Llama of about 110,000 parameters in fp32 on the CPU, without dropout, embeddings tied.
    """
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        attention_dropout=0.0,
        # Both make copying quick to learn: weights large enough for attention to start uneven, rotations fast enough
        # to tell near positions apart. With the usual 0.02 nothing is copied after six epochs.
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def _pieces() -> list[str]:
    """List what is one token each: turn markers, the halves of all slot values, the words of all sentences."""
    pieces = list(_TURNS)
    for first, second in SLOT_HALVES.values():
        pieces += [f" {half}" for half in first] + [half for half in second if len(half) > 1]
    for sentence in _SENTENCES:
        pieces += re.findall(r" [A-Za-z]+", f" {sentence}")
    return list(dict.fromkeys(pieces))
