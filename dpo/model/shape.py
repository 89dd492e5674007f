"""An architecture's sizes without its weights: parameters and activations counted on the meta device.

Nothing is allocated, so the sizes of any model are known on any machine. Legend: H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from dpo.config import LoraConfig
from dpo.errors import UserError, one_line
from dpo.model import adapters
from dpo.model.blocks import fuse_gelu, spare_last_mlp

ATTENTION = "dpo_meta"
"""Name under which transformers knows the stand-in for a fused attention kernel while activations are counted."""
PROBE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory, time and traffic of a model depend on.

    Attributes:
        parameters: All, tied ones once.
        body: Those that multiply a token: matrices other than embeddings and head; of a mixture's experts those of as
            many as are active.
        layers: Transformer blocks.
        hidden: H.
        vocabulary: V of the head.
        linear: Parameters of the weights of linear layers other than the head: what can be held in 4 bits.
        attention_width: Query heads x head size, summed over layers.
        activations: Bytes a token that a forward pass of the body keeps for backward; None where it cannot be told.
        block_input: Bytes a token of the blocks' inputs, which is what is kept when activations are recomputed.
        shared_activations: The same where attention copies keys and values together, as it does for shared prompts.
        last_mlp: Bytes that the last block's MLP keeps of a token; not of one that nothing reads (last_mlp.py).
        keys_and_values: Bytes a token of the keys and values of all blocks, which each prompt has there once more.
        has_fused_experts: Whether a weight has three dimensions, as those of several experts in one tensor have.
        largest: Parameters of the largest weight.
    """

    parameters: int
    body: int
    layers: int
    hidden: int
    vocabulary: int
    linear: int
    attention_width: int
    activations: int | None
    block_input: int
    shared_activations: int | None
    last_mlp: int
    keys_and_values: int
    has_fused_experts: bool
    largest: int

    @property
    def sizes(self) -> dict[str, int]:
        """What operations are counted from; see `estimate.useful_flops`."""
        return {"body": self.body, "head": self.hidden * self.vocabulary, "attention_width": self.attention_width}

    def kept(
        self, tokens: int, prompts: int, *, is_shared: bool, recomputed: bool, unread: int = 0
    ) -> float | None:
        """Bytes that live at a time for backward.

        Args:
            tokens, prompts: Tokens of a row, and how many of them are prompts'.
            unread: How many of them predict nothing.
            is_shared: Whether chosen and rejected completions share their prompts.
            recomputed: Whether only the blocks' inputs are kept, and at a time what one block keeps.
        """
        of_token = self.shared_activations if is_shared else self.activations
        if of_token is None:
            return None
        kept = of_token * tokens + (self.keys_and_values * prompts if is_shared else 0)
        if recomputed:
            return self.block_input * tokens + kept / self.layers
        return kept - self.last_mlp * unread


class _Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for backward: inputs, output and one number a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, size = query.shape
        output = query.new_empty(rows, tokens, heads, size)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


@dataclass
class _Attention:
    """Stands for a kernel; `copies` keys and values first, as a gather does, and counts their bytes."""

    copies: bool
    bytes: int = 0

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        self.bytes += key.nbytes + value.nbytes
        if self.copies:
            key, value = key.clone(), value.clone()
        return _Fused.apply(query, key, value), None


def _kept_bytes(model: Any, num_tokens: int, **terms: Any) -> int:
    """Bytes of all tensors that autograd keeps after a forward pass of the body, weights among them."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    inputs = {
        "input_ids": torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"),
        "position_ids": torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"),
    }
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(**inputs, **terms, use_cache=False)
    del output
    return sum(storage.nbytes() for storage in kept.values())


def _activations(model: Any, *, copies: bool) -> tuple[int | None, int, int]:
    """Bytes a token that are kept, None where they cannot be told; those of the last MLP; those of keys and values."""
    attention = _Attention(copies)
    AttentionInterface.register(ATTENTION, attention)
    try:
        model.set_attn_implementation(ATTENTION)
        # The difference of two lengths: weights and other constants fall out.
        kept = (_kept_bytes(model, 2 * PROBE_TOKENS) - _kept_bytes(model, PROBE_TOKENS)) // PROBE_TOKENS
        keys_and_values = attention.bytes // (3 * PROBE_TOKENS)
        read = [
            _kept_bytes(model, PROBE_TOKENS, predicting=torch.zeros(rows, dtype=torch.int64, device="meta"))
            for rows in (PROBE_TOKENS // 2, PROBE_TOKENS)
        ]
    except Exception:  # any architecture's own code runs here, and only an estimate is lost
        return None, 0, 0
    return kept, 2 * (read[1] - read[0]) // PROBE_TOKENS, keys_and_values


def steady_length(config: Any) -> int | None:
    """Tokens up to which rotary positions mean the same in every batch; None for any.

    Beyond, `longrope` and `dynamic` choose their frequencies by the longest sequence of a call.
    """
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    ropes = [rope for rope in (given, *given.values()) if isinstance(rope, dict)]
    limits = [
        rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for rope in ropes
        if rope.get("rope_type") == "longrope"
    ]
    limits += [text.max_position_embeddings for rope in ropes if rope.get("rope_type") == "dynamic"]
    return min(filter(None, limits), default=None)


def adapter_parameters(config: Any, lora: LoraConfig, *, trust_remote_code: bool = False) -> int:
    """Parameters of the adapters that model.lora puts into the model of a config.

    Raises:
        UserError: If model.lora.targets do not fit the model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        adapters.add(model, replace(lora, dora=False), seed=0, base="")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not lora.dora:
        return trained
    return trained + sum(m.out_features for m in model.modules() if hasattr(m, "lora_A"))  # one norm an output


def _active(weight: Tensor, text: Any) -> int:
    """Parameters of a matrix, or of a tensor of several experts' matrices, that multiply a token."""
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk")
    chosen = next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
    if weight.dim() != 3 or chosen is None:
        return weight.numel()
    return weight.numel() // weight.shape[0] * min(chosen, weight.shape[0])


def shape_of(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Shape:
    """Sizes of the causal language model that a config describes.

    Args:
        config: Of transformers, as `load.load_config` gives; not changed.
        dtype: Of the weights, which decides that of the activations.
        trust_remote_code: Run code that comes with the model.
    Returns:
        The sizes; activations are those of the model's own eager code with fused kernels for attention and GELU.
    Raises:
        UserError: If it is no causal language model.
    """
    config = copy.deepcopy(config)  # a model keeps its config and sets its attention there
    config._attn_implementation = None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
            fuse_gelu(model)
            spare_last_mlp(model)
    except (ValueError, KeyError, ImportError) as error:
        reason = one_line(error, 300)
        raise UserError(f"model.policy: cannot be built from its config: {reason}") from None
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"model.policy: {type(model).__name__} has no output embedding; use a causal LM")
    text = config.get_text_config()
    body = [
        _active(parameter, text)
        for module in model.modules()
        if module is not head and not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    vocabulary, hidden = head.weight.shape
    heads = getattr(text, "num_attention_heads", 0)  # a state-space model has none
    head_size = getattr(text, "head_dim", None) or hidden // max(1, heads)
    activations, last_mlp, keys_and_values = _activations(model, copies=False)
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        body=sum(body),
        layers=text.num_hidden_layers,
        hidden=hidden,
        vocabulary=vocabulary,
        linear=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head),
        attention_width=text.num_hidden_layers * heads * head_size,
        activations=activations,
        block_input=text.num_hidden_layers * hidden * dtype.itemsize,
        shared_activations=_activations(model, copies=True)[0],
        last_mlp=last_mlp,
        keys_and_values=keys_and_values,
        has_fused_experts=any(p.dim() == 3 for p in model.parameters()),
        largest=max(p.numel() for p in model.parameters()),
    )
