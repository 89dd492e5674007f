"""The frozen reference beside a policy under training: started with it, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo.data.mixture import Pairs
from dpo.errors import UserError
from dpo.model import adapters, load, products
from dpo.model.check import use_layout
from dpo.model.forward import Scorer, own_logits_logps
from dpo.model.reference import Reference, from_scores, nothing, online, online_with_tokens
from dpo.run.checks import check_distributions
from dpo.run.roles import has_own_weights, reference_dtype
from dpo.run.setup import Setup
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import gather, only_main, together
from dpo.runtime.weights import fingerprint
from dpo.sampling.answers import Answer, Decoding, answers_to
from dpo.training.load_models import load_weights
from dpo.training.policy import Policy, middling_pairs, settled_layout, start_policy
from dpo.training.reference_cache import cached_scores, manifest_of
from dpo.types import PackedBatch, PairLogps

Frozen = tuple[Scorer, Callable[[PackedBatch], Tensor]]
"""A reference and what scores a batch with it: the scorer itself, or the engine that shards it."""


@dataclass
class FrozenReference:
    """The reference beside a policy under training.

    Attributes:
        of_training, of_validation: reference(batch) -> PairLogps of the pairs of each data set, without gradient; of a
            reference that moves, of training as it stands and of validation as it was at the start.
        dtype: In which it scores.
        scorer: Backbone and head; None where there is none, or once a cached reference has no more need of it.
        view: view(): the block within which the scorer is the reference, where it is the policy's own.
        answers: To the sample prompts; they never change.
    """

    of_training: Reference
    of_validation: Reference
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


def _overflows(setup: Setup, scorer: Scorer) -> bool:
    """Whether a model's log-probs are not finite on any rank; collective."""
    logps = [own_logits_logps(scorer, pair, setup.world.device) for pair in middling_pairs(setup)]
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
    sharded = setup.zero_stage == 3
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
        reason = f"a frozen copy of the adapter {path}, over the same weights"
    policy = start_policy(setup, path, model)
    kind = f"{wanted.path}, {mode}" if wanted.path else mode
    policy.notes.insert(0, f"reference: {kind}, {str(dtype).removeprefix('torch.')} ({reason})")
    scorer, score = own or (policy.scorer, policy.score)
    if own is not None:
        _set_layout(setup, scorer, policy)
    check_distributions(setup.config, [policy.scorer, scorer])
    for note in policy.notes:
        say(note)
    answer = online_with_tokens(scorer) if "tdpo" in setup.config.loss.names else online(score)
    frozen = FrozenReference(answer, answer, dtype, scorer)
    if mode == "cached" or wanted.sync_steps is not None:
        scores = _scores_by(setup, policy, scorer, score, dtype, say)
        frozen = (_cached_reference if mode == "cached" else _moving_reference)(setup, frozen, scores)
        if mode == "cached" and own is not None and sharded:
            deepspeed_engine.stop(score)
    if mode != "adapter":
        return policy, frozen
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
    layout, given_up = settled_layout(setup, scorer, policy.layout)
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
    if "sampo" in setup.config.loss.names:
        path += f", sampo {setup.config.train.seed}"
    if products.multiplies_in_fp32(dtype, setup.world.device):
        path += ", products in fp32"
    cache = Path(setup.config.reference.cache_dir or setup.config.data.cache_folder)

    def scores(pairs: Pairs) -> Reference:
        manifest = manifest_of(weights, pairs, dtype, policy.layout, path)
        loader = setup.loader(pairs, policy.layout)
        return from_scores(cached_scores(score, loader, manifest, cache, setup.world, say), setup.world.device)

    return scores


def _cached_reference(setup: Setup, frozen: FrozenReference, scores: Callable[[Pairs], Reference]) -> FrozenReference:
    """Scores of both data sets and answers to the sample prompts, after which no model is needed."""
    train = scores(setup.train_pairs)
    validation = train if setup.validation_pairs is None else scores(setup.validation_pairs)
    return replace(frozen, of_training=train, of_validation=validation, answers=frozen.answer(setup), scorer=None)


def _moving_reference(setup: Setup, frozen: FrozenReference, scores: Callable[[Pairs], Reference]) -> FrozenReference:
    """A reference that will follow the policy. Evaluations and samples compare with what it says as it starts, since
    rewards of two steps can be compared under one reference alone."""
    validation = frozen.of_validation if setup.validation_pairs is None else scores(setup.validation_pairs)
    answers = frozen.answer(setup) if setup.config.log.samples else None
    return replace(frozen, of_validation=validation, answers=answers)
