"""The policy under training and the frozen reference beside it: loaded, placed, checked against the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo.config import Config
from dpo.data.planner import Layout
from dpo.errors import UserError
from dpo.model import load
from dpo.model.check import settle, use_layout
from dpo.model.forward import Scorer, pair_logps
from dpo.model.reference import Reference, from_scores, nothing, online, online_with_tokens
from dpo.reference_cache import cached_scores, manifest_of
from dpo.run_data import Pairs
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import gather, together
from dpo.sample import greedy_answers
from dpo.setup import Setup
from dpo.types import PackedBatch, PairLogps

CHECKPOINTING_FROM = 2e9
"""Parameters above which activations are recomputed on a GPU by default."""


@dataclass
class Policy:
    """A policy under training.

    Attributes:
        engine: DeepSpeed's, around the scorer.
        scorer: Backbone and head.
        layout: The one that is exact for this model.
        attention: How it attends.
        notes: Lines for the log.
    """

    engine: Any
    scorer: Scorer
    layout: Layout
    attention: str
    notes: list[str]

    def score(self, batch: PackedBatch, *terms: Any) -> Tensor:
        """Log-probs of a batch through the engine; see `Scorer.forward`."""
        return self.engine(batch, *terms)

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
        answers: To the sample prompts; they never change.
    """

    train: Reference
    validation: Reference
    dtype: torch.dtype
    scorer: Scorer | None
    answers: list[str] | None = None

    def answer(self, setup: Setup) -> list[str]:
        """Greedy answers to the sample prompts, made once; collective."""
        if self.answers is None:
            assert self.scorer is not None
            self.answers = greedy_answers(
                self.scorer,
                setup.tokenizer,
                setup.sample_prompts(),
                setup.config.log.sample_tokens,
                setup.world.device,
            )
        return self.answers


def _load(setup: Setup, path: str, dtype: torch.dtype, engine_config: dict[str, Any]) -> Any:
    model = setup.config.model
    sharded = deepspeed_engine.zero_stage(engine_config) == 3
    revision = model.revision if path == model.policy else None
    # Before anybody waits for the others in a collective of the device: a download may take long.
    together(lambda: load.fetch_weights(path, revision=revision))
    loaded = together(
        lambda: load.load_model(
            path, dtype=dtype, seed=setup.config.train.seed, trust_remote_code=model.trust_remote_code,
            revision=revision, zero3_config=engine_config if sharded else None,
        )
    )
    if len(setup.tokenizer) > loaded.get_input_embeddings().num_embeddings:
        raise UserError("the tokenizer has more tokens than the policy; use the policy's own tokenizer")
    return loaded


def _longest_sequence(setup: Setup) -> int:
    sets = [pairs for pairs in (setup.train_pairs, setup.validation_pairs) if pairs is not None]
    return max(int((pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)).max()) for pairs in sets)


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
    config, world = setup.config, setup.world
    model = _load(setup, path, setup.dtype, setup.engine_config) if model is None else model
    notes: list[str] = []
    if _checkpointing(config, model, world.device):
        load.checkpoint_activations(model)
        notes.append("activations: recomputed in backward (model.gradient_checkpointing)")
    scorer = Scorer(model, with_certainty=config.loss.wpo and not for_sft)
    engine = deepspeed_engine.start_training(scorer, setup.engine_config, config.optim)
    by_length = setup.train_pairs.lengths.sum(axis=1).argsort()
    middle = [setup.train_pairs[int(i)] for i in by_length[len(by_length) // 2 :][:2]]
    layout, given_up = together(
        lambda: settle(
            scorer, config.train.layout, middle, _longest_sequence(setup), world.device, config.model.attention
        )
    )
    if len(set(gather((layout, scorer.own_head, scorer.attention)))) > 1:
        raise UserError(f"train.layout {config.train.layout}: the ranks disagree whether it is exact; use padded")
    loss = config.loss
    if scorer.own_head and not for_sft and (loss.wpo or "tdpo" in loss.names):
        option = "loss.wpo" if loss.wpo else "loss.name tdpo"
        raise UserError(
            f"{option} is for models whose logits are a matrix product; the head of {config.model.policy} does more, so"
            f" leave it out"
        )
    notes += given_up
    attention = "one causal call per row" if layout == "padded" else f"{scorer.attention} per segment"
    size = f"{_count(model) / 1e6:.1f}M parameters in {setup.precision}"
    notes.append(f"layout: {layout}; attention: {attention}; {size}")
    return Policy(engine, scorer, layout, attention, notes)


def start_models(setup: Setup, path: str, say: Callable[[str], None]) -> tuple[Policy, FrozenReference]:
    """Start the policy and the reference that is frozen beside it; collective.

    Under ZeRO 1 and 2 the reference is a plain copy of the loaded policy, under ZeRO-3 a second sharded engine. A
    cached reference of the policy's own dtype needs neither: before the first step the policy is the reference. A loss
    that needs no reference has none.

    Args:
        setup: The run.
        path: Weights that both start from.
        say: Shows a line.
    Returns:
        Policy and reference.
    Raises:
        UserError: If the model cannot be loaded or scored faithfully, or a cache is of something else.
    """
    world, wanted = setup.world, setup.config.reference
    sharded = deepspeed_engine.zero_stage(setup.engine_config) == 3
    cached = wanted.mode == "cached"
    dtype, reason = reference_dtype(wanted.dtype, setup.dtype, world.device, sharded=sharded, cached=cached)
    if sharded and dtype == torch.float16 and world.device.type == "cpu":
        raise UserError("reference.dtype is fp16 under ZeRO-3 on a CPU, where DeepSpeed refuses it; use bf16 or fp32")
    model = _load(setup, path, setup.dtype, setup.engine_config)
    if not setup.config.needs_reference:
        return _without_reference(setup, start_policy(setup, path, model), say)
    scorer: Scorer | None = None
    score: Callable[[PackedBatch], Tensor] | None = None
    if not (cached and dtype == setup.dtype):
        if sharded:
            frozen = deepspeed_engine.frozen_config(setup.engine_config, dtype)
            scorer = Scorer(_load(setup, path, dtype, frozen))
            score = deepspeed_engine.start_frozen(scorer, frozen)
        else:
            # Moved first: the copy of a large model would else pass through every rank's host memory.
            score = scorer = Scorer(load.frozen_copy(model.to(world.device), dtype))
    policy = start_policy(setup, path, model)
    policy.notes.insert(0, f"reference: {wanted.mode}, {str(dtype).removeprefix('torch.')} ({reason})")
    if scorer is None or score is None:
        scorer, score = policy.scorer, policy.score
    else:
        use_layout(scorer, policy.layout, policy.scorer.own_head, policy.scorer.attention)
    for note in policy.notes:
        say(note)
    if not cached:
        answer = online_with_tokens(scorer) if "tdpo" in setup.config.loss.names else online(score)
        return policy, FrozenReference(answer, answer, dtype, scorer)
    return policy, _cached_reference(setup, policy, scorer, score, dtype, say)


def _without_reference(setup: Setup, policy: Policy, say: Callable[[str], None]) -> tuple[Policy, FrozenReference]:
    """No copy and no forward pass; the sample prompts are answered by the policy before its first step."""
    for note in ["reference: none (the loss needs none)", *policy.notes]:
        say(note)
    frozen = FrozenReference(nothing, nothing, setup.dtype, policy.scorer)
    if setup.config.log.samples:
        frozen.answers = frozen.answer(setup)
    frozen.scorer = None
    return policy, frozen


def _cached_reference(
    setup: Setup,
    policy: Policy,
    scorer: Scorer,
    score: Callable[[PackedBatch], Tensor],
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> FrozenReference:
    """Scores of both data sets and answers to the sample prompts, after which no model is needed."""
    weights = deepspeed_engine.fingerprint(scorer.model)
    path = policy.attention + (", own head" if scorer.own_head else "")
    if setup.config.loss.ld_alpha is not None:
        path += f", ld_alpha {setup.config.loss.ld_alpha}"
    cache = Path(setup.config.reference.cache_dir or setup.config.data.cache_folder)

    def scores(pairs: Pairs) -> Reference:
        manifest = manifest_of(weights, pairs, dtype, policy.layout, path)
        loader = setup.loader(pairs, policy.layout)
        return from_scores(cached_scores(score, loader, manifest, cache, setup.world, say), setup.world.device)

    train = scores(setup.train_pairs)
    validation = train if setup.validation_pairs is None else scores(setup.validation_pairs)
    frozen = FrozenReference(train, validation, dtype, scorer)
    frozen.answers = frozen.answer(setup)
    frozen.scorer = None
    return frozen


def reference_dtype(
    wanted: str, policy_dtype: torch.dtype, device: torch.device, *, sharded: bool, cached: bool
) -> tuple[torch.dtype, str]:
    """The reference's dtype and why."""
    if wanted not in ("auto", "policy"):
        return deepspeed_engine.DTYPES[wanted], "reference.dtype"
    if wanted == "policy" or sharded or cached:
        why = " under ZeRO-3" if sharded else ": the policy scores before its first step" if cached else ""
        return policy_dtype, f"the policy's dtype{why}"
    if device.type == "cuda":
        return torch.float16, "half the memory, and log-probs closer than bf16"
    return policy_dtype, "the policy's dtype: half precision products are slow on a CPU"


def _count(model: torch.nn.Module) -> int:
    counts: Callable[[Any], int] = lambda p: getattr(p, "ds_numel", p.numel())  # noqa: E731
    return sum(counts(p) for p in model.parameters())


def _checkpointing(config: Config, model: torch.nn.Module, device: torch.device) -> bool:
    wanted = config.model.gradient_checkpointing
    return wanted if wanted != "auto" else device.type == "cuda" and _count(model) > CHECKPOINTING_FROM
