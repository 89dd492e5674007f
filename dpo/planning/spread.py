"""How an epoch's pairs are spread over ranks and micro-batches: the planner's own work, without a rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpo.data.planner import num_tokens
from dpo.estimate import computed_flops, costs_beside_tokens, imbalance, micro_batch_tokens, waiting
from dpo.model.shape import Shape
from dpo.objective.catalog import couples_pairs
from dpo.run.setup import Setup

SAMPLED_STEPS, SAMPLED_PAIRS = 256, 1_000_000
"""Most steps of an epoch, and about most pairs, that are planned to describe it; evenly spaced in a longer epoch."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The planner's work on an epoch, or on a sample of its steps.

    Attributes:
        steps, looked_at: Steps of an epoch, and how many of them were planned.
        micro_steps: (looked_at,) micro-batches of every rank; one less, as below, where `last` is not None.
        imbalances, waits: (looked_at,) see `estimate.imbalance` and `estimate.waiting`.
        last: Imbalance of the epoch's last step if that has fewer pairs and is not counted above; else None.
        padding: Share of the tokens computed that are padding.
        pairs, tokens: In a whole step, over all ranks; tokens with their padding, a mean.
        largest: Tokens of the largest micro-batch.
        largest_completions, largest_prompts: Most completion and most prompt tokens of a micro-batch.
        flops: Mean operations of a whole step over all ranks, given what is recomputed.
    """

    steps: int
    looked_at: int
    micro_steps: np.ndarray
    imbalances: np.ndarray
    waits: np.ndarray
    last: float | None
    padding: float
    pairs: int
    tokens: float
    largest: int
    largest_completions: int
    largest_prompts: int
    flops: float


def _sampled(steps: int, pairs: int) -> list[int]:
    count = min(steps, SAMPLED_STEPS, max(8, SAMPLED_PAIRS // pairs))
    return sorted(set(np.linspace(0, steps - 1, count).astype(int).tolist()))


def schedule_of(setup: Setup, shape: Shape, *, recompute: bool, reference: bool) -> Schedule:
    """Plan the first epoch, or an even sample of its steps, as every rank would.

    Args:
        setup: The run.
        shape: Of the policy.
        recompute: Whether activations are computed again in backward.
        reference: Whether a reference scores every batch.
    """
    layout, lengths, epochs = setup.config.train.layout, setup.train_pairs.lengths, setup.epochs
    loader = setup.loader(setup.train_pairs, layout)
    order, size = epochs.order(0), epochs.global_batch_size
    packed = num_tokens(lengths, "packed" if layout == "padded" else layout)
    shapes, last, computed, real, largest, completions, prompts = [], None, 0, 0, 0, 0, 0
    looked_at = _sampled(epochs.steps_per_epoch, size)
    for step in looked_at:
        ids = order[step * size : (step + 1) * size]
        plan = loader.plan_of(ids)
        tokens = micro_batch_tokens(plan, lengths, layout)
        if loader.row_tokens is not None:
            tokens = np.full_like(tokens, loader.row_tokens)
        costs = tokens + costs_beside_tokens(plan, lengths, layout, loader.costs)
        if len(ids) < size and len(looked_at) > 1:
            last = imbalance(costs)
        else:
            spent = computed_flops(
                lengths[ids], layout, tokens=int(tokens.sum()), recompute=recompute, reference=reference,
                look_ahead=couples_pairs(setup.config.loss.names), **shape.sizes,
            )
            shapes.append((tokens.shape[1], imbalance(costs), waiting(costs), spent, int(tokens.sum())))
        computed, real = computed + int(tokens.sum()), real + int(packed[ids].sum())
        largest = max(largest, int(tokens.max()))
        completions = max(completions, *(int(lengths[b, 1:].sum()) for rank in plan for b in rank if b))
        prompts = max(prompts, *(int(lengths[b, 0].sum()) for rank in plan for b in rank if b))
    counts, imbalances, waits, flops, whole = np.array(shapes).T
    return Schedule(
        epochs.steps_per_epoch, len(looked_at), counts, imbalances, waits, last, 1 - real / computed,
        min(size, len(lengths)), float(whole.mean()), largest, completions, prompts, float(flops.mean()),
    )  # fmt: skip


def schedule_rows(schedule: Schedule) -> list[tuple[str, str]]:
    """How the pairs of a step are spread."""
    few = schedule.looked_at < schedule.steps
    micro, even, waits = schedule.micro_steps, schedule.imbalances, schedule.waits
    whole = f"a sample of {schedule.looked_at:,} of the" if few else "all"
    rows = [
        ("looked at", f"{whole} {schedule.steps:,} steps of the first epoch"),
        ("micro-batches a step and rank", f"{micro.mean():.2f} mean, {micro.max():.0f} max"),
        ("largest micro-batch", f"{schedule.largest:,} tokens"),
        ("padding", f"{schedule.padding:.1%} of the tokens computed"),
        ("rank imbalance (max / mean cost)", f"{even.mean():.4f} mean, {even.max():.4f} worst"),
        ("the same, waiting after every micro-batch", f"{waits.mean():.4f} mean, {waits.max():.4f} worst"),
    ]
    if schedule.last is not None:
        rows.append(("rank imbalance of the last, smaller step", f"{schedule.last:.4f}"))
    return rows
