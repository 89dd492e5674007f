"""PackedBatch -> log-probs of its completions, in one forward pass.

`Scorer` is the module that a DeepSpeed engine gets: backbone, selection of the rows that predict completion tokens,
head, sum per sequence. The same class wraps policy and reference. `check.settle` compares it with what the model itself
says; a model whose head does more than a matrix product, a scale and a soft-cap is scored through its own head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo.model.attention import UnsupportedAttention
from dpo.model.blocks import spare_last_mlp
from dpo.model.head import CHUNK_ROWS, Head, logps_of_logits
from dpo.model.logits import logit_map_of
from dpo.model.loss_in_forward import Chunk, PairLosses, chunks_of, total_loss
from dpo.model.products import HALF
from dpo.model.router import Balance
from dpo.model.sequence import SequenceGroup
from dpo.model.vocabulary import logps_and_certainties, token_kls
from dpo.types import FrozenTokens, PackedBatch, PairLogps, TokenizedPair


class Scorer(nn.Module):
    """Log-probs of completions under a causal language model.

    Attributes:
        model: The transformers model.
        own_head: Score through the model's own head, which takes padded batches.
        native_attention: Name of the model's own attention implementation.
        attention: Kernel of packed rows, a name in attention.BACKENDS.
        balance: The load-balancing loss of a mixture of experts, where it is to be trained on; see router.py.
        across: The ranks that compute a row together, each a cut of it; None for a row a rank.
        router_loss: That loss of the last batch that was scored with gradient, in a layout without padding.
    """

    def __init__(self, model: Any, chunk_rows: int = CHUNK_ROWS) -> None:
        super().__init__()
        self.model = model
        # It looks for pad tokens among the ids, which would wait for a GPU; what is padded here is known.
        model.base_model.warn_if_padding_and_no_attention_mask = _say_nothing
        self.head = Head(model.get_output_embeddings(), chunk_rows, logit_map_of(model.config))
        self.own_head = False
        self.native_attention = model.config._attn_implementation
        self.attention = "sdpa"
        self.balance: Balance | None = None
        self.router_loss: Tensor | None = None
        self.across: SequenceGroup | None = None
        spare_last_mlp(model)
        self.register_state_dict_post_hook(_without_frozen)
        self.register_load_state_dict_pre_hook(_without_certainty)

    def forward(
        self,
        batch: PackedBatch,
        *,
        frozen: FrozenTokens | None = None,
        certain: bool = False,
        pair_losses: PairLosses | None = None,
    ) -> Any:
        """Score a batch.

        Args:
            batch: On the model's device.
            frozen: What the reference knows of the same tokens, to measure the KL from it as well.
            certain: Measure how certain the model is of every token as well.
            pair_losses: Take the gradient of these losses in the forward pass; needs `chunks`.
        Returns:
            (S,) fp32 (fp64 for an fp64 model): summed log-probs of every sequence's completion, nats, weighted by the
            batch's token_weights. With `frozen` or `certain` (2, S): below it the summed KL(reference || policy) of the
            tokens, or the sum of logp_t - log sum_v p_t(v)^2, without gradient. With `pair_losses` the sum of the
            losses, and the log-probs (S,) without gradient.
        """
        if pair_losses is not None:
            chunks = self.chunks(batch)
            assert chunks is not None
            logit_map = self.head.logit_map
            in_forward = partial(
                total_loss, batch=batch, chunks=chunks, pair_losses=pair_losses, logit_map=logit_map
            )  # fmt: skip
            return self.head(self.hidden(batch), batch.target_ids, in_forward)
        if self.across is not None:
            return self._sums_across(self.across, batch)
        if frozen is None and not certain:
            token_logps = self._own_token_logps(batch) if self.own_head else self._token_logps(batch)
            return sums_by_sequence(self._weighted(token_logps, batch), batch)
        hidden, head = self.hidden(batch), self.head
        if frozen is not None:
            token_logps = head(hidden, batch.target_ids)
            second = token_kls(hidden, head.weight, head.bias, frozen, head.chunk_rows, head.logit_map)
        else:
            both = partial(
                logps_and_certainties, targets=batch.target_ids, chunk_rows=head.chunk_rows, logit_map=head.logit_map
            )
            token_logps, certainty = head(hidden, batch.target_ids, both)
            second = token_logps.detach() - certainty
        rows = self._weighted(token_logps, batch), second
        return torch.stack([sums_by_sequence(row, batch) for row in rows])

    def _sums_across(self, across: SequenceGroup, batch: PackedBatch) -> Tensor:
        if batch.segments is None:
            raise UnsupportedAttention("its rows are not cut over ranks (train.sequence_parallel_size)")
        cut = across.cut(batch)
        own = sums_by_sequence(self._weighted(self._token_logps(cut), cut), cut)
        return across.add(own) if batch.num_sequences else own

    def chunks(self, batch: PackedBatch) -> list[Chunk] | None:
        """How the gradient of a loss can be taken in the forward pass; None where it cannot."""
        return None if self.own_head else chunks_of(batch.completion_sizes, self.head.chunk_rows)

    def _weighted(self, token_logps: Tensor, batch: PackedBatch) -> Tensor:
        return token_logps if batch.token_weights is None else token_logps * batch.token_weights

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        inputs = {"input_ids": batch.input_ids.view(batch.num_rows, -1), "use_cache": False}
        if batch.segments is None:
            return inputs  # positions of a padded row are the model's own, and not every model takes them
        packed: dict[str, Any] = {
            "position_ids": batch.position_ids.view(batch.num_rows, -1), "segments": batch.segments
        }  # fmt: skip
        if self.across is not None:
            packed["across"] = self.across
        if self.model.last_mlp is not None and self.balance is None and len(batch.predicting):
            packed["predicting"] = batch.predicting
        return inputs | packed

    def hidden(self, batch: PackedBatch) -> Tensor:
        """(N, H): the hidden states that predict the completion tokens."""
        backbone, inputs = self.model.base_model, self._inputs(batch)
        if self.balance is not None and torch.is_grad_enabled():
            output = backbone(**inputs, output_router_logits=True)
            real = batch.input_ids.numel() - batch.num_tail_tokens
            self.router_loss = self.balance(tuple(logits[:real] for logits in output.router_logits))
        else:
            output = backbone(**inputs)
        hidden = output.last_hidden_state  # (rows, T / rows, H)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.score_index)

    def _token_logps(self, batch: PackedBatch) -> Tensor:
        return self.head(self.hidden(batch), batch.target_ids)  # (N,)

    def _own_token_logps(self, batch: PackedBatch) -> Tensor:
        width = batch.input_ids.numel() // batch.num_rows
        columns = torch.unique(batch.score_index % width)  # the same columns are kept in every row
        if len(columns) == 0:
            columns = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
        logits = self.model(**self._inputs(batch), logits_to_keep=columns).logits
        rows = batch.score_index // width
        logits = logits[rows, torch.searchsorted(columns, batch.score_index % width)]  # (N, V)
        return logps_of_logits(logits, batch.target_ids)

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Within the block the model attends by its own implementation, as generation and unpadded rows need."""
        current = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.native_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(current)


def sums_by_sequence(of_tokens: Tensor, batch: PackedBatch) -> Tensor:
    """(S,): a value per scored token (N,), summed over every sequence.

    In fp64: on a GPU the order of the sum is another each time, and what that changes is rounded away.
    """
    if batch.num_sequences == 0:
        # Still a function of every weight: ZeRO-3 runs every module's hooks on every rank, in backward too.
        return of_tokens.sum()[None][:0]
    sums = of_tokens.new_zeros(batch.num_sequences, dtype=torch.float64)
    return sums.index_add(0, batch.sequence_ids, of_tokens.double()).to(of_tokens.dtype)


def _say_nothing(*_: Any) -> None:
    pass


def _without_frozen(scorer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave weights that never learn out of a checkpoint, under all their names: DeepSpeed knows one name a weight, and
    an output embedding has two or three. What is stored beneath a weight's name goes with it: the scales of 4 bits."""
    named = scorer.named_parameters(remove_duplicate=False)
    frozen = {prefix + name for name, parameter in named if not parameter.requires_grad}
    for key in list(state):
        parts = key.split(".")
        if any(".".join(parts[:count]) in frozen for count in range(1, len(parts) + 1)):
            del state[key]


def _without_certainty(scorer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of loss.wpo that were written before 2026-11-30 hold the output embedding once more."""
    for key in [key for key in state if key.startswith(f"{prefix}certainty.")]:
        del state[key]


def pair_logps(
    score: Callable[..., Tensor], batch: PackedBatch, frozen: FrozenTokens | None = None, certain: bool = False
) -> PairLogps:
    """Score a preference batch and name the halves.

    Args:
        score: A Scorer, or an engine around one.
        batch: 2P sequences, chosen first.
        frozen, certain: See `Scorer.forward`.
    Returns:
        Log-probs of the P pairs, with their KLs or certainties where asked for; differentiable if `score` is.
    """
    if frozen is None and not certain:
        return halves(score(batch), batch)
    logps, sums = score(batch, frozen=frozen, certain=certain)  # (S,), (S,)
    pairs = halves(logps, batch)
    if frozen is not None:
        return replace(pairs, kls=torch.stack(sums.tensor_split(2)))
    return replace(pairs, certainties=torch.stack((sums.detach() / batch.completion_lengths).tensor_split(2)))


def halves(logps: Tensor, batch: PackedBatch) -> PairLogps:
    """Log-probs of sequences (S,), by pair."""
    chosen, rejected = logps.tensor_split(2)
    chosen_lengths, rejected_lengths = batch.completion_lengths.tensor_split(2)
    return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)


@torch.no_grad()
def own_logits_logps(scorer: Scorer, pair: TokenizedPair, device: torch.device) -> Tensor:
    """Completion log-probs by the model's own logits, each sequence alone and unpadded.

    In 16 bits logits are rounded, those around 100 by up to a quarter. Where nothing else tells them from the head's
    product in fp32, the log-probs are those of the product.

    Returns:
        (2,) summed log-probs, chosen then rejected.
    """
    sums, inputs = [], []
    output_layer = scorer.model.get_output_embeddings()
    watch = output_layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with scorer.own_attention(), watch:
        for completion, scored in pair.completions:
            prompt, answer = (torch.from_numpy(x.astype("int64")).to(device) for x in (pair.prompt_ids, completion))
            ids = torch.cat((prompt, answer))[None]
            kept = torch.arange(len(answer)) if scored is None else torch.from_numpy(scored.nonzero()[0])
            rows, targets = kept.to(device) + len(prompt) - 1, answer[kept.to(device)]
            logits = scorer.model(input_ids=ids, use_cache=False).logits[0, rows]
            own = logps_of_logits(logits, targets)
            if inputs and scorer.head.weight.dtype in HALF:
                of_product = scorer.head(inputs.pop()[0, rows], targets)
                spacing = torch.finfo(scorer.head.weight.dtype).eps * logits.abs().amax(dim=1)
                own = of_product if ((own - of_product) / spacing).square().mean().sqrt() <= 0.5 else own
            sums.append(own.sum())
    return torch.stack(sums)


@contextmanager
def whole_rows(*scorers: Scorer) -> Iterator[None]:
    """Within it every rank computes the rows it is given alone; the same scorer may stand there twice."""
    before = [(scorer, scorer.across) for scorer in scorers]
    for scorer in scorers:
        scorer.across = None
    try:
        yield
    finally:
        for scorer, across in before:
            scorer.across = across
