"""Tokenizers of characters, made on the spot, chat templates, good and bad, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS_AND_EOS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system\\nrole') }}"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OTHER_START = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def tokenizer_of(kind: str, **options: Any) -> Any:
    """A tokenizer of characters: byte-level, or SentencePiece-like with a space put before every text."""
    if kind == "byte":
        vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"aehiosnrtHNY", "\u2581H", "\u2581a"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = [("\u2581", "H"), ("\u2581", "a")]
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    around = options.pop("around", "<s> $A" if kind == "pieces" else "$A")
    backend.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, backend.token_to_id(token)) for token in SPECIAL]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | options
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **{k: v for k, v in names.items() if v}
    )


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def end_of(tokenizer: Any, token: str = "</s>") -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text without special tokens: a SentencePiece-like decoder shows the first space only behind a BOS."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def written(folder: Path, rows: list[Any]) -> Path:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def plain_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}:", "chosen": f" {i}" * (i % 5 + 1), "rejected": " no"} for i in range(count)]
