"""TokenizedPairs -> PackedBatch: the only place that knows how pairs are laid out.

    shared   one row      P C R | P C R | ...          the rejected completion reads the prompt, not the chosen one
    packed   one row      P C | P R | P C | P R ...    every sequence by itself, no padding
    padded   S rows       P C . . / P R . . .          chosen rows first; padding on the right, invisible to causal
                                                       attention and never scored
    chosen   one row      P C | P C | ...              for SFT; padded_chosen is its padded twin

Scored tokens are ordered by sequence: chosen 0..P-1, then rejected P..2P-1. The last prompt token predicts the first
token of both completions; in the shared layout its row therefore stands in `score_index` twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dpo.data.planner import Layout
from dpo.types import PackedBatch, Segment, Segments, TokenizedPair

DUMMY_TOKENS = 2
TAIL_SEGMENT = 128
"""Tokens of one segment of a dummy tail: short, so that attention within it costs next to nothing."""


def _scored(first_row: int, prompt_row: int, length: int) -> np.ndarray:
    """Rows that predict a completion whose tokens stand at first_row..: the prompt's last one, then its own."""
    return np.concatenate(([prompt_row], np.arange(first_row, first_row + length - 1)))


def _one_row(
    pairs: Sequence[TokenizedPair], layout: Layout
) -> tuple[np.ndarray, np.ndarray, tuple[Segment, ...], list[np.ndarray]]:
    """Token ids, positions, segments and, per sequence, the scored rows of a one-row layout."""
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    chosen_rows: list[np.ndarray] = []
    rejected_rows: list[np.ndarray] = []
    offset = 0
    for pair in pairs:
        prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        p, c, r = len(prompt), len(chosen), len(rejected)
        ids += [prompt, chosen]
        positions.append(np.arange(p + c))
        segments.append(Segment(offset, offset + p + c))
        chosen_rows.append(_scored(offset + p, offset + p - 1, c))
        start = offset + p + c
        if layout == "shared":
            ids.append(rejected)
            positions.append(np.arange(p, p + r))
            segments.append(Segment(start, start + r, offset, offset + p))
            rejected_rows.append(_scored(start, offset + p - 1, r))
            offset = start + r
        elif layout == "packed":
            ids += [prompt, rejected]
            positions.append(np.arange(p + r))
            segments.append(Segment(start, start + p + r))
            rejected_rows.append(_scored(start + p, start + p - 1, r))
            offset = start + p + r
        else:
            offset = start
    return np.concatenate(ids), np.concatenate(positions), tuple(segments), chosen_rows + rejected_rows


def _padded(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Token ids, positions and, per sequence (prompt, completion), the scored rows of a padded layout."""
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    rows: list[np.ndarray] = []
    for s, (prompt, completion) in enumerate(sequences):
        p, c = len(prompt), len(completion)
        ids[s, :p] = prompt
        ids[s, p : p + c] = completion
        rows.append(_scored(s * width + p, s * width + p - 1, c))
    return ids.reshape(-1), np.tile(np.arange(width), len(sequences)), rows


def _in_order(weights: Sequence[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """(N,) fp32: weights in the order of the scored tokens, chosen completions first."""
    chosen, rejected = zip(*weights, strict=True)
    return torch.from_numpy(np.concatenate(chosen + rejected).astype(np.float32))


def index_segments(items: Sequence[Segment]) -> Segments:
    """Segments with the index tensors of kernels that attend in one call.

    Args:
        items: Covering 0..T in order; a prefix is the start of an earlier segment, and of one later segment at most.
    """
    rows = [
        np.concatenate((np.arange(s.prefix_start, s.prefix_end), np.arange(s.start, s.end))) for s in items
    ]  # of each segment's keys
    widths = np.array([s.prefix_end - s.prefix_start for s in items], dtype=np.int64)
    lengths = np.array([s.end - s.start for s in items], dtype=np.int64)
    is_copy = np.concatenate([np.arange(len(r)) < width for r, width in zip(rows, widths, strict=True)])
    kv_index = np.concatenate(rows)
    shared = kv_index[is_copy]
    assert len(np.unique(shared)) == len(shared), "a row may stand in two segments, not in three"

    def starts(sizes: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(([0], sizes.cumsum())).astype(np.int32))

    return Segments(
        items=tuple(items),
        cu_q=starts(lengths),
        cu_k=starts(widths + lengths),
        prefixes=torch.tensor([(s.prefix_start, s.prefix_end) for s in items], dtype=torch.int32),
        kv_index=torch.from_numpy(kv_index),
        own=torch.from_numpy(np.flatnonzero(~is_copy)),
        shared=torch.from_numpy(shared),
        copies=torch.from_numpy(np.flatnonzero(is_copy)),
        longest_q=int(lengths.max()),
        longest_k=int((widths + lengths).max()),
    )


def _tail(start: int, end: int) -> list[Segment]:
    return [Segment(at, min(at + TAIL_SEGMENT, end)) for at in range(start, end, TAIL_SEGMENT)]


def filled(batch: PackedBatch, multiple: int) -> PackedBatch:
    """A batch of one packed row with a dummy tail that makes its length a multiple.

    Args:
        batch: On any device; with segments.
        multiple: Of which the length is to be one.
    Returns:
        The batch itself, if it is.
    """
    length = len(batch.input_ids)
    tail = -length % multiple
    if tail == 0:
        return batch
    assert batch.segments is not None
    segments = index_segments([*batch.segments.items, *_tail(length, length + tail)])
    return replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, tail)),
        position_ids=torch.nn.functional.pad(batch.position_ids, (0, tail)),
        segments=segments.map(lambda tensor: tensor.to(batch.input_ids.device)),
        num_tail_tokens=batch.num_tail_tokens + tail,
    )


def _dummy(layout: Layout, row_tokens: int | None) -> PackedBatch:
    """Tokens that score nothing: keeps a rank without pairs in step with the others."""
    padded = layout.startswith("padded")
    length = DUMMY_TOKENS if padded else max(DUMMY_TOKENS, row_tokens or 0)
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        input_ids=torch.zeros(length, dtype=torch.int64),
        position_ids=torch.zeros(length, dtype=torch.int64),
        num_rows=1,
        segments=None if padded else index_segments(_tail(0, length)),
        score_index=none,
        predicting=none,
        target_ids=none,
        sequence_ids=none,
        completion_lengths=none,
        margins=torch.zeros(0),
        pair_index=none,
        completion_sizes=(),
        pair_ids=(),
        num_useful_tokens=0,
    )


def collate(
    pairs: Sequence[TokenizedPair],
    layout: Layout,
    token_weights: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    row_tokens: int | None = None,
) -> PackedBatch:
    """Lay pairs out for one forward pass.

    Args:
        pairs: The pairs of one micro-batch; none gives a dummy batch.
        layout: See the module's docstring.
        token_weights: For every pair, of the scored tokens of chosen and rejected; None where all count 1.
        row_tokens: Length to which a packed row is filled by a dummy tail, so that all micro-batches have one shape;
            a longer row stays as it is. None for no tail.
    Returns:
        The batch, on the CPU.
    """
    if not pairs:
        return _dummy(layout, row_tokens)
    prompts = [p.prompt_ids for p in pairs]
    completions, scored = [p.chosen_ids for p in pairs], [p.chosen_scored for p in pairs]
    if layout not in ("chosen", "padded_chosen"):
        prompts, completions = prompts * 2, completions + [p.rejected_ids for p in pairs]
        scored += [p.rejected_scored for p in pairs]
    padded = layout.startswith("padded")
    segments: Segments | None = None
    tail = 0
    if padded:
        ids, positions, rows = _padded(list(zip(prompts, completions, strict=True)))
    else:
        ids, positions, items, rows = _one_row(pairs, layout)
        tail = max(0, (row_tokens or 0) - len(ids))
        segments = index_segments([*items, *_tail(len(ids), len(ids) + tail)])
        ids, positions = np.pad(ids, (0, tail)), np.pad(positions, (0, tail))
    rows = [own if kept is None else own[kept] for own, kept in zip(rows, scored, strict=True)]
    targets = [ids if kept is None else ids[kept] for ids, kept in zip(completions, scored, strict=True)]
    lengths, score_index = np.array([len(own) for own in targets], dtype=np.int64), np.concatenate(rows)
    return PackedBatch(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        position_ids=torch.from_numpy(positions.astype(np.int64)),
        num_rows=len(completions) if padded else 1,
        segments=segments,
        score_index=torch.from_numpy(score_index.astype(np.int64)),
        predicting=torch.from_numpy(np.unique(score_index).astype(np.int64)),
        target_ids=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(targets)), lengths)),
        completion_lengths=torch.from_numpy(lengths),
        margins=torch.tensor([p.margin for p in pairs], dtype=torch.float32),
        pair_index=torch.tensor([p.pair_id for p in pairs], dtype=torch.int64),
        completion_sizes=tuple(lengths.tolist()),
        pair_ids=tuple(p.pair_id for p in pairs),
        num_useful_tokens=sum(map(len, prompts)) + sum(map(len, completions)),
        token_weights=None if token_weights is None else _in_order(token_weights),
        num_tail_tokens=tail,
    )
