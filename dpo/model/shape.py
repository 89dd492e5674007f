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

from dpo.config import LoraConfig
from dpo.errors import UserError
from dpo.model import adapters
from dpo.model.load import fuse_gelu

ATTENTION = "dpo_meta"
"""Name under which transformers knows the stand-in for a fused attention kernel while activations are counted."""
PROBE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory, time and traffic of a model depend on.

    Attributes:
        parameters: All, tied ones once.
        body: Those that multiply every token: matrices other than embeddings and head. All experts of a mixture count.
        layers: Transformer blocks.
        hidden: H.
        vocabulary: V of the head.
        attention_width: Query heads x head size, summed over layers.
        activations: Bytes a token that a forward pass of the body keeps for backward; None where it cannot be told.
        block_input: Bytes a token of the blocks' inputs, which is what is kept when activations are recomputed.
        keys_and_values: Bytes a token of all blocks' keys and values, which a row with shared prompts gathers anew.
    """

    parameters: int
    body: int
    layers: int
    hidden: int
    vocabulary: int
    attention_width: int
    activations: int | None
    block_input: int
    keys_and_values: int

    def kept(self, *, recomputed: bool) -> float | None:
        """Bytes a token that live at a time for backward; recomputed: the blocks' inputs and what one block keeps."""
        if self.activations is None:
            return None
        return self.block_input + self.activations / self.layers if recomputed else self.activations

    def gathered(self, *, recomputed: bool) -> float:
        """Bytes that a key and value of a shared row take beside them, in all blocks or, recomputed, in one."""
        return self.keys_and_values / self.layers if recomputed else self.keys_and_values


class _Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for backward: inputs, output and one number a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, size = query.shape
        output = query.new_empty(rows, tokens, heads, size)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value), None


def _kept_bytes(model: Any, num_tokens: int) -> int:
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
        output = model.base_model(**inputs, use_cache=False)
    del output
    return sum(storage.nbytes() for storage in kept.values())


def _activations(model: Any) -> int | None:
    AttentionInterface.register(ATTENTION, _attend)
    try:
        model.set_attn_implementation(ATTENTION)
        # The difference of two lengths: weights and other constants fall out.
        return (_kept_bytes(model, 2 * PROBE_TOKENS) - _kept_bytes(model, PROBE_TOKENS)) // PROBE_TOKENS
    except Exception:  # any architecture's own code runs here, and only an estimate is lost
        return None


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
    except (ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.policy: cannot be built from its config: {reason}") from None
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"model.policy: {type(model).__name__} has no output embedding; use a causal LM")
    body = [
        parameter.numel()
        for module in model.modules()
        if module is not head and not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    text = config.get_text_config()
    vocabulary, hidden = head.weight.shape
    heads = getattr(text, "num_attention_heads", 0)  # a state-space model has none
    head_size = getattr(text, "head_dim", None) or hidden // max(1, heads)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        body=sum(body),
        layers=text.num_hidden_layers,
        hidden=hidden,
        vocabulary=vocabulary,
        attention_width=text.num_hidden_layers * heads * head_size,
        activations=_activations(model),
        block_input=text.num_hidden_layers * hidden * dtype.itemsize,
        keys_and_values=2 * text.num_hidden_layers * key_heads * head_size * dtype.itemsize,
    )
