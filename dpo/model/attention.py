"""Attention over the segments of a packed row: which kernel, whether it can be trusted, how transformers calls it.

A packed row holds many causal segments; the rejected completion of a prefix-shared pair reads its prompt's keys and
values as well. The idea of one row per pair: Wang & Hegde 2024, arXiv:2410.20305.

    varlen   PyTorch's variable-length flash kernel over gathered keys and values      CUDA, fp16 and bf16
    flash    the same by flash-attn, where it is installed                             CUDA, fp16 and bf16
    flex     FlexAttention: the only one for soft-capped scores and short windows      CUDA
    sdpa     two scaled-dot-product calls a pair                                       anywhere

varlen_eager and flex_eager are their twins in plain PyTorch, for tests and for the self-test. Segments travel to every
layer as the keyword argument `segments` of the model's call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dpo.data.batch import index_segments
from dpo.model import attention_flex, attention_sdpa, attention_varlen
from dpo.model.products import HALF
from dpo.model.sequence import SequenceGroup
from dpo.types import Segment, Segments

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "varlen": lambda *inputs: attention_varlen.attend(attention_varlen.torch_varlen(), *inputs),
    "flash": lambda *inputs: attention_varlen.attend(attention_varlen.flash(), *inputs),
    "flex": attention_flex.attend,
    "sdpa": attention_sdpa.attend,
    "varlen_eager": partial(attention_varlen.attend, attention_varlen.eager),
    "flex_eager": attention_flex.eager,
}
"""attend(query, key, value, segments, scaling) -> (1, T, heads, head_dim); CHANGE_SCORES also take
window and softcap."""
CHANGE_SCORES = ("flex", "flex_eager")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest error of the self-test, relative to the largest value, that is rounding and not another mask."""


class UnsupportedAttention(Exception):
    """The model asks for something a kernel cannot express; the message says what."""


class Asked(NamedTuple):
    """What a layer asks of a kernel.

    Attributes:
        heads, kv_heads: Of queries; of keys and values.
        size, value_size: Of a head of queries and keys; of values.
        scaling: Factor on the scores; None for 1 / sqrt(size).
        softcap: On the scores; None for none.
        has_window: Whether its window is shorter than some sequence.
    """

    heads: int
    kv_heads: int
    size: int
    value_size: int
    scaling: float | None = None
    softcap: float | None = None
    has_window: bool = False


def _extras(backend: str, kwargs: dict[str, Any], segments: Segments) -> dict[str, Any]:
    """Window and soft-cap for the kernels that know them; refused to the others where they would matter."""
    if kwargs.get("s_aux") is not None:
        raise UnsupportedAttention("attention has sinks")
    softcap, window = kwargs.get("softcap"), kwargs.get("sliding_window")
    if window is not None and segments.longest_k <= window:
        window = None
    if backend in CHANGE_SCORES:
        return {"window": window, "softcap": softcap}
    if softcap is not None:
        raise UnsupportedAttention(f"attention scores are soft-capped at {softcap}")
    if window is not None:
        raise UnsupportedAttention(
            f"a sliding window of {window} tokens is shorter than a sequence of {segments.longest_k}"
        )
    return {}


def segment_attention(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    across: SequenceGroup | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within segments; after the backend the signature is that of transformers' attention functions.

    Args:
        backend: Name in BACKENDS.
        module: The attention layer.
        query: (1, heads, T, head_dim).
        key, value: (1, kv_heads, T, head_dim); kv_heads divides heads.
        attention_mask: Must be None: segments say everything.
        scaling: Factor on the scores; None for 1 / sqrt(head_dim).
        dropout: Ignored: policy and reference are compared token by token, so both are deterministic.
        segments: Which rows see which.
        across: The ranks that hold the row in cuts, where this is not the whole of it; then T is that of the cut.
    Returns:
        (1, T, heads, head_dim) and None for the attention weights.
    Raises:
        UnsupportedAttention: For sinks; for soft-capped scores or a sliding window shorter than a segment where the
            backend does not know them.
    """
    if segments is None or attention_mask is not None:
        raise UnsupportedAttention("the model does not hand keyword arguments down to its attention layers")
    extras = _extras(backend, kwargs, segments)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return BACKENDS[backend](query, key, value, segments, scaling, **extras)

    if across is not None:
        return across.exchange(attend, module, query, key, value), None
    return attend(query, key, value), None


def _name(backend: str) -> str:
    # A number: transformers looks for "sdpa" and the like within names and asks the model for its own support.
    return f"dpo_kernel_{list(BACKENDS).index(backend)}"


def register(backend: str) -> str:
    """Make a backend known to transformers; calling it again changes nothing.

    Returns:
        The name under which models are told to use it: a private one, because position_ids without these segments
        would be silently wrong: transformers takes their jumps for a new document and hides the prompt from the
        rejected completion.
    """
    name = _name(backend)
    # Never within a compiled block: what segments hold changes from batch to batch.
    AttentionInterface.register(name, torch.compiler.disable(partial(segment_attention, backend)))
    return name


@contextmanager
def watched_calls(backend: str) -> Iterator[list[Asked]]:
    """Collect what every call asks for that attends in segments within the block, once a layer: a layer that mixes
    tokens in any other way (state space, linear attention, convolution) would let one sequence see another."""
    calls: list[Asked] = []

    def watched(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        window = kwargs.get("sliding_window") if backend in CHANGE_SCORES else None
        calls.append(Asked(*sizes, kwargs.get("scaling"), kwargs.get("softcap"), window is not None))
        return segment_attention(backend, module, query, key, value, mask, *args, **kwargs)

    AttentionInterface.register(_name(backend), watched)
    try:
        yield calls
    finally:
        register(backend)


def candidates(wanted: str, device: torch.device) -> list[str]:
    """Backends to try, the preferred one first; sdpa, which runs anywhere, is always the last.

    Args:
        wanted: model.attention.
        device: Of the model.
    """
    if wanted != "auto":
        return list(dict.fromkeys([wanted, "sdpa"]))
    if device.type != "cuda":
        return ["sdpa"]
    installed = ["flash"] if importlib.util.find_spec("flash_attn") else []
    return ["varlen", *installed, "flex", "sdpa"]


USUAL = (Asked(4, 4, 64, 64), Asked(4, 2, 64, 64))
"""What most models ask for: grouped key heads or not."""
PROBE_WINDOW = 20


def _probe(backend: str, asked: Asked, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Output and gradients of a row with unequal lengths, prefixes among them, seeded."""
    items = (Segment(0, 70), Segment(70, 170, 0, 33), Segment(170, 172), Segment(172, 173, 170, 171))
    segments = index_segments(items).map(lambda tensor: tensor.to(device))
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, size, value_size, scaling, softcap, has_window = asked
    of_inputs = (heads, 173, size), (kv_heads, 173, size), (kv_heads, 173, value_size)
    shapes = *of_inputs, (173, heads, value_size)
    made = [torch.randn((1, *shape), generator=generator).to(torch.bfloat16) for shape in shapes]
    *inputs, grad = (x.to(device, dtype) for x in made)
    needs_grad = backend != "flex" or device.type == "cuda"
    inputs = [x.requires_grad_(needs_grad) for x in inputs]
    extras = {"softcap": softcap, "window": PROBE_WINDOW if has_window else None} if backend in CHANGE_SCORES else {}
    output = BACKENDS[backend](*inputs, segments, scaling, **extras)
    return [output.detach(), *(torch.autograd.grad(output, inputs, grad) if needs_grad else ())]


def self_test(
    backend: str, dtype: torch.dtype, device: torch.device, asked: Iterable[Asked] = USUAL
) -> str | None:
    """Whether a backend computes what its twin does: unequal lengths, causal alignment, grouped heads, gradients.

    Args:
        backend: Name in BACKENDS.
        dtype: Of the policy.
        device: Of the model.
        asked: For what.
    Returns:
        Why it cannot be used; None if it can.
    """
    complaints = (_mismatch(backend, dtype, device, one) for one in asked)
    return _unavailable(backend, dtype, device) or next(filter(None, complaints), None)


def _unavailable(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    if backend in ("varlen", "flash", "flex") and device.type != "cuda":
        return "it needs a GPU"
    if backend in ("varlen", "flash") and dtype not in HALF:
        return f"it takes fp16 and bf16, and the policy is in {str(dtype).removeprefix('torch.')}"
    return None


def _mismatch(backend: str, dtype: torch.dtype, device: torch.device, asked: Asked) -> str | None:
    try:
        found = _probe(backend, asked, dtype, device)
    except Exception as error:  # whatever a kernel of another version or machine may raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    twin = "flex_eager" if asked.softcap is not None or asked.has_window else "varlen_eager"
    truth = _probe(twin, asked, torch.float64, device)
    for what, a, b in zip(("output", "query", "key", "value"), found, truth, strict=False):
        error_size = float((a.double() - b).abs().max() / b.abs().max())
        if not error_size <= TOLERANCE[dtype]:
            of = what if what == "output" else f"gradient of the {what}"
            heads = f"{asked.kv_heads} of {asked.heads} key heads of {asked.size}"
            return f"self-test with {heads}: its {of} is off by {error_size:.2g}"
    return None
