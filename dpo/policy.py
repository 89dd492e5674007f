"""The policy under training and the frozen reference beside it: loaded, placed, checked against the model itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo.data.mixture import Pairs
from dpo.data.planner import Layout
from dpo.errors import UserError
from dpo.load_models import add_adapter, load_weights
from dpo.model import adapters, load, products, router
from dpo.model.check import settle, use_layout
from dpo.model.forward import Scorer, own_logits_logps, pair_logps
from dpo.model.reference import Reference, from_scores, nothing, online, online_with_tokens
from dpo.model.sequence import sequence_notes
from dpo.reference_cache import cached_scores, manifest_of
from dpo.roles import check_distributions, has_own_weights, reference_dtype
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime import sequence
from dpo.runtime.distributed import agree, gather, only_main, together
from dpo.runtime.weights import fingerprint, num_parameters
from dpo.sample import Answer, Decoding, answers_to
from dpo.setup import Setup
from dpo.types import PackedBatch, PairLogps, TokenizedPair

Frozen = tuple[Scorer, Callable[[PackedBatch], Tensor]]
"""A reference and what scores a batch with it: the scorer itself, or the engine that shards it."""


@dataclass
class Policy:
    """A policy under training.

    Attributes:
        engine: DeepSpeed's, around the scorer.
        scorer: Backbone and head.
        layout: The one that is exact for this model.
        attention: How it attends.
        notes: Lines for the log.
        router_coefficient: Weight of the load-balancing loss of a mixture of experts; 0 for none.
        in_forward: Take the gradient of losses in the forward pass of the head, where that is possible.
    """

    engine: Any
    scorer: Scorer
    layout: Layout
    attention: str
    notes: list[str]
    router_coefficient: float = 0.0
    in_forward: bool = False

    def router_loss(self, share: float) -> Tensor | float:
        """The weighted load-balancing loss of the last forward pass, for a micro-batch of a share of the step."""
        if not self.router_coefficient:
            return 0.0
        assert self.scorer.router_loss is not None
        return self.router_coefficient * share * self.scorer.router_loss

    def score(self, batch: PackedBatch, *terms: Any) -> Tensor:
        """Log-probs of a batch through the engine; see `Scorer.forward`."""
        return self.engine(batch, *terms)

    def takes_loss_in_forward(self, batch: PackedBatch, reference: PairLogps) -> bool:
        """Whether the gradient of a loss is taken in the forward pass of the head.

        It can be of a loss of summed log-probs; a KL over the vocabulary, a certainty, the model's own head and a pair
        longer than a tile rule it out.
        """
        beside_sums = reference.tokens is not None or self.scorer.certainty is not None
        return self.in_forward and not beside_sums and self.scorer.chunks(batch) is not None

    def logps(self, batch: PackedBatch, reference: PairLogps) -> PairLogps:
        """Log-probs of a preference batch, with what the loss needs beside them."""
        return pair_logps(self.score, batch, reference.tokens, self.scorer.certainty is not None)


@dataclass
class FrozenReference:
    """The reference beside a policy under training.

    Attributes:
        train, validation: reference(batch) -> PairLogps of the pairs of each data set, without gradient.
        dtype: In which it scores.
        scorer: Backbone and head; None where there is none, or once a cached reference has no more need of it.
        view: view(): the block within which the scorer is the reference, where it is the policy's own.
        answers: To the sample prompts; they never change.
    """

    train: Reference
    validation: Reference
    dtype: torch.dtype
    scorer: Scorer | None
    view: Callable[[], AbstractContextManager[None]] = nullcontext
    answers: list[Answer] | None = None

    def answer(self, setup: Setup) -> list[Answer]:
        """Greedy answers to the sample prompts, made once; collective."""
        if self.answers is None:
            assert self.scorer is not None
            decoding = Decoding(setup.config.log.sample_tokens)
            prompts, device = setup.sample_prompts(), setup.world.device
            with self.view():
                found = answers_to(prompts, self.scorer, setup.tokenizer, decoding, device)
            self.answers = only_main(setup.world, lambda: found)
        return self.answers


def start_policy(setup: Setup, path: str, model: Any = None, *, for_sft: bool = False) -> Policy:
    """Start the engine that trains a policy, with the layout that is exact for it; collective.

    Args:
        setup: The run.
        path: Weights to start from.
        model: The loaded policy; None to load it from `path`.
        for_sft: Leave out what the preference loss needs.
    Returns:
        The policy.
    Raises:
        UserError: If the model cannot be loaded or scored faithfully.
    """
    config = setup.config
    model = load_weights(setup, path, setup.dtype, setup.engine_config, policy=True) if model is None else model
    if setup.trains_adapters and not adapters.attached(model):
        add_adapter(setup, path, model)
    notes: list[str] = []
    if config.model.gradient_checkpointing is True:
        load.checkpoint_activations(model)
        notes.append("activations: recomputed in backward (model.gradient_checkpointing)")
    scorer = Scorer(model, with_certainty=config.loss.wpo and not for_sft)
    engine = deepspeed_engine.start_training(scorer, setup.engine_config, config.optim)
    scorer.across = sequence.join(config.train.sequence_parallel_size, model.config)
    coefficient = together(lambda: router.coefficient(model, config.loss.router_aux_coef))
    wanted: Layout = "packed" if coefficient else config.train.layout
    layout, given_up = _settled(setup, scorer, wanted)
    notes += sequence_notes(scorer.across, coefficient)
    if coefficient:
        notes.append(
            f"router: load-balancing loss x {coefficient:g} on every micro-batch; layout packed, where every token of a"
            f" sequence counts once (loss.router_aux_coef)"
        )
        if layout != "packed":
            raise UserError(f"loss.router_aux_coef is {coefficient:g} and {given_up[0]}; set it to 0")
        scorer.balance = router.balance_of(model)
    notes += given_up
    attention = "one causal call per row" if layout == "padded" else f"{scorer.attention} per segment"
    size = f"{num_parameters(model) / 1e6:.1f}M parameters in {setup.precision}"
    if setup.trains_adapters:
        size += f", {num_parameters(model, trained=True) / 1e6:.3g}M of them trained (LoRA)"
    notes.append(f"layout: {layout}; attention: {attention}; {size}")
    scorer.head.multiple = config.model.vocabulary_multiple
    return Policy(engine, scorer, layout, attention, notes, coefficient, setup.loss_in_forward)


def _settled(setup: Setup, scorer: Scorer, wanted: Layout) -> tuple[Layout, list[str]]:
    """See `check.settle`; the same on every rank."""
    middle, longest, kernel = _middle(setup), setup.longest_sequence, setup.config.model.attention
    device = setup.world.device
    return together(lambda: settle(scorer, wanted, middle, longest, device, kernel, agree))


def _middle(setup: Setup) -> list[TokenizedPair]:
    """Two pairs of middling length, or the one there is."""
    by_length = setup.train_pairs.lengths.sum(axis=1).argsort()
    return [setup.train_pairs[int(i)] for i in by_length[len(by_length) // 2 :][:2]]


def _overflows(setup: Setup, scorer: Scorer) -> bool:
    """Whether a model's log-probs are not finite on any rank; collective."""
    logps = [own_logits_logps(scorer, pair, setup.world.device) for pair in _middle(setup)]
    return any(gather(not bool(torch.cat(logps).isfinite().all())))


def start_models(setup: Setup, path: str, say: Callable[[str], None]) -> tuple[Policy, FrozenReference]:
    """Start the policy and the reference that is frozen beside it; collective.

    Under ZeRO 1 and 2 the reference is a plain copy of the loaded policy, under ZeRO-3 a second sharded engine. Two
    kinds need no second model: the base beneath adapters, and a cached reference of the policy's own dtype, since
    before the first step the policy is the reference. A loss that needs no reference has none.

    Args:
        setup: The run.
        path: Weights that both start from.
        say: Shows a line.
    Returns:
        Policy and reference.
    Raises:
        UserError: If the model cannot be loaded or scored faithfully, or a cache is of something else.
    """
    wanted, mode = setup.config.reference, setup.reference_mode
    sharded = deepspeed_engine.zero_stage(setup.engine_config) == 3
    dtype, reason = reference_dtype(wanted.dtype, setup.dtype, setup.world.device, sharded=sharded, mode=mode)
    if sharded and dtype == torch.float16 and setup.world.device.type == "cpu":
        raise UserError("reference.dtype is fp16 under ZeRO-3 on a CPU, where DeepSpeed refuses it; use bf16 or fp32")
    model = load_weights(setup, path, setup.dtype, setup.engine_config, policy=True)
    if mode == "none":
        policy = start_policy(setup, path, model)
        check_distributions(setup.config, [policy.scorer])
        return _without_reference(setup, policy, say)
    own: Frozen | None = None
    if has_own_weights(setup.config, dtype, setup.dtype):
        own = _start_reference(setup, path, model, dtype, sharded=sharded)
        if dtype == torch.float16 != setup.dtype and wanted.dtype == "auto" and _overflows(setup, own[0]):
            own, dtype, reason = None, setup.dtype, "the policy's dtype: this model overflows in fp16"
            own = _start_reference(setup, path, model, dtype, sharded=sharded)
    if mode == "adapter" and adapters.is_adapter(path):
        together(lambda: adapters.take_up(model, path, adapters.REFERENCE))
    policy = start_policy(setup, path, model)
    kind = f"{wanted.path}, {mode}" if wanted.path else mode
    policy.notes.insert(0, f"reference: {kind}, {str(dtype).removeprefix('torch.')} ({reason})")
    scorer, score = own or (policy.scorer, policy.score)
    if own is not None:
        _set_layout(setup, scorer, policy)
    check_distributions(setup.config, [policy.scorer, scorer])
    for note in policy.notes:
        say(note)
    if mode == "cached":
        frozen = _cached_reference(setup, policy, scorer, score, dtype, say)
        if own is not None and sharded:
            deepspeed_engine.stop(score)
        return policy, frozen
    answer = online_with_tokens(scorer) if "tdpo" in setup.config.loss.names else online(score)
    if wanted.sync_steps is not None:
        return policy, _moving_reference(setup, policy, scorer, score, dtype, say)
    if mode != "adapter":
        return policy, FrozenReference(answer, answer, dtype, scorer)
    view = adapters.reference_view(model)

    def without_adapter(batch: PackedBatch) -> PairLogps:
        with view():
            return answer(batch)

    return policy, FrozenReference(without_adapter, without_adapter, dtype, scorer, view)


def _start_reference(setup: Setup, path: str, model: Any, dtype: torch.dtype, *, sharded: bool) -> Frozen:
    """A reference with weights of its own: those of reference.path, or of the policy as it starts."""
    other = setup.config.reference.path
    if sharded:
        frozen = deepspeed_engine.frozen_config(setup.engine_config, dtype)
        scorer = Scorer(load_weights(setup, other or path, dtype, frozen))
        return scorer, deepspeed_engine.start_frozen(scorer, frozen)
    if other is None:
        # Moved first: the copy of a large model would else pass through every rank's host memory.
        scorer = Scorer(load.frozen_copy(model.to(setup.world.device), dtype))
    else:
        loaded = load_weights(setup, other, dtype, setup.engine_config)
        scorer = Scorer(loaded.requires_grad_(False).to(setup.world.device))
    return scorer, scorer


def _set_layout(setup: Setup, scorer: Scorer, policy: Policy) -> None:
    """Make a reference score batches as the policy does; another model is asked whether that is exact for it."""
    scorer.across, scorer.head.multiple = policy.scorer.across, policy.scorer.head.multiple
    if setup.config.reference.path is None:
        use_layout(scorer, policy.layout, policy.scorer.own_head, policy.scorer.attention)
        return
    layout, given_up = _settled(setup, scorer, policy.layout)
    if layout != policy.layout:
        raise UserError(f"reference.path {setup.config.reference.path}: {given_up[0]}; use --train.layout {layout}")


def _without_reference(setup: Setup, policy: Policy, say: Callable[[str], None]) -> tuple[Policy, FrozenReference]:
    """No copy and no forward pass; the sample prompts are answered by the policy before its first step."""
    for note in ["reference: none (the loss needs none)", *policy.notes]:
        say(note)
    frozen = FrozenReference(nothing, nothing, setup.dtype, policy.scorer)
    if setup.config.log.samples:
        frozen.answers = frozen.answer(setup)
    frozen.scorer = None
    return policy, frozen


def _scores_by(
    setup: Setup,
    policy: Policy,
    scorer: Scorer,
    score: Callable[[PackedBatch], Tensor],
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> Callable[[Pairs], Reference]:
    """What a reference says of a data set as it stands, computed once and kept on disk."""
    weights = fingerprint(scorer.model)
    path = policy.attention + (", own head" if scorer.own_head else "")
    if setup.config.loss.ld_alpha is not None:
        path += f", ld_alpha {setup.config.loss.ld_alpha}"
    if products.multiplies_in_fp32(dtype, setup.world.device):
        path += ", products in fp32"
    cache = Path(setup.config.reference.cache_dir or setup.config.data.cache_folder)

    def scores(pairs: Pairs) -> Reference:
        manifest = manifest_of(weights, pairs, dtype, policy.layout, path)
        loader = setup.loader(pairs, policy.layout)
        return from_scores(cached_scores(score, loader, manifest, cache, setup.world, say), setup.world.device)

    return scores


def _moving_reference(
    setup: Setup,
    policy: Policy,
    scorer: Scorer,
    score: Callable[[PackedBatch], Tensor],
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> FrozenReference:
    """A reference that will follow the policy. Evaluations and samples compare with what it says as it starts, since
    rewards of two steps can be compared under one reference alone."""
    validation: Reference = nothing
    if setup.validation_pairs is not None:
        validation = _scores_by(setup, policy, scorer, score, dtype, say)(setup.validation_pairs)
    frozen = FrozenReference(online(score), validation, dtype, scorer)
    if setup.config.log.samples:
        frozen.answer(setup)
    return frozen


def _cached_reference(
    setup: Setup,
    policy: Policy,
    scorer: Scorer,
    score: Callable[[PackedBatch], Tensor],
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> FrozenReference:
    """Scores of both data sets and answers to the sample prompts, after which no model is needed."""
    scores = _scores_by(setup, policy, scorer, score, dtype, say)
    train = scores(setup.train_pairs)
    validation = train if setup.validation_pairs is None else scores(setup.validation_pairs)
    frozen = FrozenReference(train, validation, dtype, scorer)
    frozen.answers = frozen.answer(setup)
    frozen.scorer = None
    return frozen
