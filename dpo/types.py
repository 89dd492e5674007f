"""The records that flow through the suite, in the order they are made.

    PreferenceRow -> TokenizedPair -> PackedBatch -> PairLogps -> LossOutput; TrainState beside them

Dimension legend: P pairs, S = 2P sequences (chosen 0..P-1, then rejected P..2P-1), T tokens of a batch over all its
rows, N scored (completion) tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Message = dict[str, Any]
"""role and content, both text; tool_calls, name and the like where a conversation has them."""


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One preference as text: a prompt and two completions of it.

    Attributes:
        prompt: Plain text, or the messages of a conversation up to the answer.
        chosen: The preferred completion: text exactly as it follows the prompt, or the answering message(s).
        rejected: The other completion, in the same form.
        row: 1-based number of the row in its source, for messages to the user.
        margin: By how much `chosen` was rated above `rejected`, in the data's own unit; None where the data is silent.
        tools: JSON schemas of the tools that the chat template is told of; conversations alone.
        chat_template_kwargs: Further arguments of the chat template; conversations alone.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    row: int
    margin: float | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One preference as token ids; `prompt_ids + chosen_ids` is what the model reads.

    Attributes:
        pair_id: Index of the pair in its data set.
        prompt_ids: (p,) int32, p >= 1, any BOS included.
        chosen_ids: (c,) int32, c >= 1, its end token included unless it was truncated.
        rejected_ids: (r,) int32, r >= 1, likewise.
        margin: By how much `chosen` was rated above `rejected`, in the data's own unit; NaN where the data is silent.
        chosen_scored: (c,) bool, the first True: the tokens that the model has a say in; what a tool or the user says
            within a completion is read, not scored. None: all are scored.
        rejected_scored: (r,) likewise.
    """

    pair_id: int
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    margin: float = math.nan
    chosen_scored: np.ndarray | None = None
    rejected_scored: np.ndarray | None = None

    @property
    def completions(self) -> tuple[tuple[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray | None]]:
        """Ids of chosen and rejected, each with what is scored of them."""
        return (self.chosen_ids, self.chosen_scored), (self.rejected_ids, self.rejected_scored)

    @property
    def targets(self) -> tuple[int, int]:
        """Scored tokens of chosen and rejected."""
        chosen, rejected = (len(ids) if kept is None else int(kept.sum()) for ids, kept in self.completions)
        return chosen, rejected


@dataclass(frozen=True, slots=True)
class Segment:
    """One causal attention segment of a packed row: rows [start, end) attend to [prefix_start, prefix_end) and to
    themselves, causally. The prefix is empty except for a rejected completion that shares its pair's prompt."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True, eq=False)
class Segments:
    """The attention segments of a packed row, and the same as index tensors for kernels that take all in one call.

    Queries stand in the row as they are; keys and values of every segment, prefix first, one segment after another,
    are the rows `kv_index`: K of them, each row of the packed row once as itself and those of a prefix once more.

    Attributes:
        items: n segments, covering 0..T in order.
        cu_q: (n + 1,) int32: where each segment's queries begin, T at the end.
        cu_k: (n + 1,) int32: where each segment's keys begin in kv_index, K at the end.
        prefixes: (n, 2) int32: begin and end of each segment's prefix.
        kv_index: (K,) int64.
        own: (T,) int64: where in kv_index each row stands as itself.
        shared: (K - T,) int64: rows that stand in kv_index a second time; no row stands there thrice.
        copies: (K - T,) int64: where in kv_index that is.
        longest_q, longest_k: Most queries and most keys of a segment.
        made: What a kernel has made of these segments, once for all layers and both models.
    """

    items: tuple[Segment, ...]
    cu_q: Tensor
    cu_k: Tensor
    prefixes: Tensor
    kv_index: Tensor
    own: Tensor
    shared: Tensor
    copies: Tensor
    longest_q: int
    longest_k: int
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def map(self, change: Callable[[Tensor], Tensor]) -> Segments:
        """The same with every tensor changed."""
        return replace(self, **_changed(self, change), made={})


def _changed(record: Any, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return tensors | {name: value.map(change) for name, value in values.items() if isinstance(value, Segments)}


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The pairs of one micro-batch, laid out for one forward pass.

    The layout is the business of `data/batch.py` alone: for every layout `score_index` points into the flattened
    hidden states, and summing token log-probs by `sequence_ids` gives (S,), whose halves are chosen and rejected.

    Attributes:
        input_ids: (T,) int64; T = num_rows * row length.
        position_ids: (T,) int64, positions within each sequence.
        num_rows: Rows of the model's input: 1 for shared and packed, S for padded.
        segments: Attention segments of the packed row; None for padded, where plain causal attention is exact because
            padding stands on the right.
        score_index: (N,) int64: the row of the hidden states that predicts each scored token.
        predicting: (M,) int64: those rows, each once, in ascending order.
        target_ids: (N,) int64: the scored tokens: those of the completions, less what others say in them.
        sequence_ids: (N,) int64: the sequence each belongs to.
        completion_lengths: (S,) int64: scored tokens of each sequence.
        completion_sizes: The same as numbers of the host, which can be read without waiting for a device.
        margins: (P,) fp32: by how much the data rates chosen above rejected, in its own unit; NaN where it is silent.
        pair_index: (P,) int64: ids of the pairs, in order.
        pair_ids: The same as numbers of the host; empty for a dummy batch, which scores nothing.
        num_useful_tokens: 2P+C+R summed over pairs (P+C for SFT): the same for every layout.
        token_weights: (N,) fp32: what each scored token counts in its sequence's sum; None where all count 1.
        num_tail_tokens: Tokens at the end of a packed row that belong to no sequence and only fix its length.
    """

    input_ids: Tensor
    position_ids: Tensor
    num_rows: int
    segments: Segments | None
    score_index: Tensor
    predicting: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    completion_lengths: Tensor
    margins: Tensor
    pair_index: Tensor
    completion_sizes: tuple[int, ...]
    pair_ids: tuple[int, ...]
    num_useful_tokens: int
    token_weights: Tensor | None = None
    num_tail_tokens: int = 0

    @property
    def num_sequences(self) -> int:
        """S: 2P for preference batches, P for batches of chosen completions alone (SFT)."""
        return len(self.completion_sizes)

    @property
    def num_padding_tokens(self) -> int:
        """Tokens of the forward pass that belong to no sequence."""
        if not self.pair_ids:
            return self.input_ids.numel()
        return self.input_ids.numel() - self.num_useful_tokens if self.num_rows > 1 else self.num_tail_tokens

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on `device`; of pinned ones the host does not wait for the copies."""
        return replace(self, **_changed(self, lambda tensor: tensor.to(device, non_blocking=True)))

    def pin(self) -> PackedBatch:
        """Return the batch with its tensors in page-locked memory."""
        return replace(self, **_changed(self, Tensor.pin_memory))


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does to the product of hidden states and output embedding: z -> softcap tanh(scale z / softcap).

    Attributes:
        scale: 1 in most models.
        softcap: None for no cap.
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class FrozenTokens:
    """What the reference knows of every scored token, for losses that compare whole next-token distributions.

    Attributes:
        hidden: (N, H) hidden states that predict the tokens.
        weight: (V, H) of the reference's output embedding.
        bias: (V,) or None.
        logit_map: What the reference does after the product.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_map: LogitMap = LogitMap()


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probs of the completions of P pairs under one model.

    Attributes:
        chosen: (P,) fp32 (fp64 for an fp64 model): sum over the chosen completion's tokens, weighted by the batch's
            token_weights where it has any, nats.
        rejected: (P,) likewise.
        chosen_lengths: (P,) int64: scored tokens of the completion.
        rejected_lengths: (P,) likewise.
        kls: (2, P) chosen and rejected: KL(reference || policy) summed over the tokens, nats; for tdpo, else None.
        certainties: (2, P) mean over the tokens of logp_t - log sum_v p_t(v)^2, no gradient; for loss.wpo, else None.
        tokens: Of a reference whose whole distributions are needed.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    kls: Tensor | None = None
    certainties: Tensor | None = None
    tokens: FrozenTokens | None = None

    def of(self, pairs: slice) -> PairLogps:
        """Those of some pairs, log-probs and lengths alone."""
        return PairLogps(
            self.chosen[pairs], self.rejected[pairs], self.chosen_lengths[pairs], self.rejected_lengths[pairs]
        )


@dataclass(frozen=True, slots=True)
class Context:
    """What the loss of a pair takes from the rest of its global batch: fixed numbers, without gradient.

    Attributes:
        chosen_length: Mean scored tokens of chosen completions, over the global batch.
        partners: Loss -> (P, k), for losses that couple pairs: what the other pairs give to each pair; for odpo (P, 1)
            what the data gives: the pair's margin.
    """

    chosen_length: float
    partners: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, pairs: slice) -> Context:
        """That of some pairs."""
        return Context(self.chosen_length, {name: values[pairs] for name, values in self.partners.items()})


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What an objective says of P pairs; nothing is reduced.

    Attributes:
        losses: (P,) nats, with gradient.
        chosen_rewards: (P,) beta * (policy - reference) of the chosen completions, detached; without a reference
            beta * log-prob, per token where the loss is.
        rejected_rewards: (P,) likewise.
        parts: (L, P) what each of a sum of L losses says before its weight, detached; None for a single loss.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    parts: Tensor | None = None


@dataclass(frozen=True)
class TrainState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps of DPO that are done.
        num_tokens: Useful tokens seen so far.
        unlogged: What the next line of metrics.jsonl already holds, summed over all ranks.
        running: What the objective carries from step to step.
        skipped: Steps of this stage that were left out, see train.on_nonfinite.
    """

    step: int = 0
    num_tokens: int = 0
    unlogged: tuple[float, ...] = ()
    running: float = 0.0
    skipped: int = 0
