"""Which layout and which head give a model's true log-probs, found by asking the model itself.

At start two real pairs are scored twice: by the fast path, in one micro-batch, and by the model's own logits, each
sequence alone and unpadded. Where they differ, an attention kernel fails its self-test, or the model's attention cannot
be expressed in segments, the next simpler path is tried:

    wanted layout, each kernel, fast head  ->  padded, fast head  ->  padded, the model's own head  ->  refused
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dpo.data.batch import collate
from dpo.data.planner import Layout
from dpo.errors import UserError, one_line
from dpo.model import attention
from dpo.model.attention import UnsupportedAttention
from dpo.model.forward import Scorer, own_logits_logps
from dpo.model.products import HALF
from dpo.types import TokenizedPair

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest difference, nats per completion token, that is rounding and not another model.

In fp64 it is 1e-5, since norms and softmax of some models round to fp32 within."""
EVEN = 16
"""Completion tokens over which rounding in 16 bits evens out far enough for that."""


def use_layout(scorer: Scorer, layout: Layout, own_head: bool = False, backend: str = "sdpa") -> None:
    """Make a scorer ready for batches of a layout, attending by one of attention.BACKENDS in packed ones."""
    scorer.own_head = own_head
    scorer.attention = backend
    if layout == "padded":
        scorer.model.set_attn_implementation(scorer.native_attention)
    else:
        scorer.model.set_attn_implementation(attention.register(backend))


def counted_tokens(lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """By how many tokens the difference of a completion's log-probs is divided before it is compared with TOLERANCE.

    The rounding of few tokens has not averaged out: in 16 bits n of them, fewer than EVEN, count as sqrt(n EVEN).

    Args:
        lengths: Completion tokens, any shape.
        dtype: Of the model.
    Returns:
        fp64, the same shape.
    """
    lengths = lengths.double()
    return lengths.maximum((lengths * EVEN).sqrt()) if dtype in HALF else lengths


def _difference(scorer: Scorer, layout: Layout, pairs: Sequence[TokenizedPair], truth: torch.Tensor) -> float:
    """Largest difference from the truth, nats per completion token."""
    batch = collate(pairs, layout).to(truth.device)
    with torch.no_grad():
        logps = scorer(batch)
    return float(((logps - truth).abs() / counted_tokens(batch.completion_lengths, scorer.head.weight.dtype)).max())


def _complaint(
    scorer: Scorer, layout: Layout, own_head: bool, backend: str, pairs: Sequence[TokenizedPair], truth: torch.Tensor
) -> str | None:
    """Why a path cannot be used; None if it can."""
    if layout != "padded" and not scorer.model._can_set_attn_implementation():
        return f"{type(scorer.model).__name__} has its own attention code"
    use_layout(scorer, layout, own_head, backend)
    try:
        with attention.watched_calls(backend) as calls:
            difference = _difference(scorer, layout, pairs, truth)
    except torch.OutOfMemoryError:
        raise
    except (UnsupportedAttention, TypeError, AttributeError, RuntimeError) as error:  # a kernel's own limits too
        return one_line(error)
    layers = scorer.model.config.get_text_config().num_hidden_layers
    if layout != "padded" and len(calls) != layers:
        return f"{len(calls)} of {layers} layers attend, the others mix tokens in their own way"
    if layout != "padded" and any(isinstance(module, nn.Conv1d) for module in scorer.model.modules()):
        return "beside attention its layers have convolutions, which mix tokens across segments"
    dtype, limit = scorer.head.weight.dtype, TOLERANCE[scorer.head.weight.dtype]
    if difference <= limit:  # forward; a kernel may still refuse these heads in backward
        return attention.self_test(backend, dtype, truth.device, dict.fromkeys(calls)) if calls else None
    return f"log-probs differ from the model's own by {difference:.2g} nats a token (limit {limit:g})"


def settle(
    scorer: Scorer,
    layout: Layout,
    pairs: Sequence[TokenizedPair],
    longest: int,
    device: torch.device,
    wanted_attention: str = "auto",
    agree: Callable[[str | None], str | None] = lambda complaint: complaint,
) -> tuple[Layout, list[str]]:
    """Choose layout, attention and head for a model and leave the scorer set to them.

    Args:
        scorer: Around the policy; collective under ZeRO-3, where every rank calls it with the same pairs.
        layout: The one asked for.
        pairs: Two real pairs; one is enough for a data set of one.
        longest: Longest sequence in tokens that the run will see.
        device: Of the model.
        wanted_attention: model.attention.
        agree: One rank's complaint -> that of any rank, so that all go the same way: under ZeRO-3 a forward pass of one
            rank waits for the others.
    Returns:
        The layout to use, and a line for the log for every path given up.
    Raises:
        UserError: If no path gives the model's own log-probs.
    """
    truth = torch.stack([own_logits_logps(scorer, pair, device) for pair in pairs]).T.reshape(-1)
    backends = attention.candidates(wanted_attention, device)
    packed = [(layout, False, backend) for backend in backends] if layout != "padded" else []
    notes: list[str] = []
    for path, own_head, backend in [*packed, ("padded", False, "sdpa"), ("padded", True, "sdpa")]:
        complaint = None
        if path != "padded":
            complaint = _window_complaint(scorer, backend, longest)
            complaint = agree(complaint or attention.self_test(backend, scorer.head.weight.dtype, device))
        if complaint is None:
            complaint = agree(_complaint(scorer, path, own_head, backend, pairs, truth))  # type: ignore[arg-type]
        if complaint is None:
            return path, notes  # type: ignore[return-value]
        by = f" by {backend}" if len(backends) > 1 and path != "padded" else ""
        name = f"layout {path}{by}" + (" with the model's own head" if own_head else "")
        notes.append(f"{name} is not used: {complaint}")
    raise UserError(f"model.policy: {type(scorer.model).__name__} cannot be scored faithfully: {'; '.join(notes)}")


def _window_complaint(scorer: Scorer, backend: str, longest: int) -> str | None:
    """Why a sliding window forbids a kernel; two pairs of middling length may not show it."""
    window = getattr(scorer.model.config.get_text_config(), "sliding_window", None)
    if backend in attention.CHANGE_SCORES or window is None or longest <= window or not _uses_window(scorer):
        return None
    return f"a sliding window of {window} tokens is shorter than sequences of up to {longest}"


def _uses_window(scorer: Scorer) -> bool:
    config = scorer.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
