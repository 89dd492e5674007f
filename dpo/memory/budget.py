"""How many tokens a micro-batch may hold: what fits on every rank, found out before the first step.

    free memory  ->  are activations kept?
    free memory, or train.tokens_per_micro_batch  ->  the costliest micro-batch is run  ->  out of memory on any rank?
    half the budget, down to the longest pair  ->  activations recomputed, from the start again  ->  refused

The trial leaves nothing behind: gradients are returned and dropped, not accumulated, so that DeepSpeed never sees them
and no rank waits for another in a collective that one of them left. What was found is written to the run, and a run
that goes on with as many ranks, on as large GPUs, uses it again. Under ZeRO-3, whose forward pass is itself
collective, and where ranks compute a row together, nothing is tried: a rank that left it for lack of memory would leave
the others waiting. The budget is then what the free memory suggests, at most UNTRIED_TOKENS. A stage that runs out of
memory all the same is started again with less (`out_of_memory.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.data.planner import Layout
from dpo.errors import UserError
from dpo.estimate import GIB, STATES
from dpo.memory.out_of_memory import Budget, is_lack_of_memory, lowered, may_recompute, read_budget, write_budget
from dpo.memory.room import Room, costliest, first_step_bytes, largest, wanted_tokens
from dpo.model import blocks
from dpo.model.forward import pair_logps
from dpo.model.reference import Reference
from dpo.model.shape import shape_of
from dpo.run.setup import Setup
from dpo.runtime.distributed import gather, only_main
from dpo.runtime.weights import num_parameters
from dpo.training.policy import Policy
from dpo.types import PackedBatch, PairLogps


def can_run_out(device: torch.device) -> bool:
    """Whether lack of memory shows as an error that can be caught; on a CPU the process is killed."""
    return device.type == "cuda"


def choose(
    first: int,
    longest: int,
    fits: Callable[[int], bool],
    recompute: Callable[[], int] | None,
    say: Callable[[str], None],
) -> int:
    """The largest budget on the ladder that fits.

    Args:
        first: Tokens to try first.
        longest: Tokens of the longest pair, the lowest rung.
        fits: Runs the costliest micro-batch of a budget; the same answer on every rank.
        recompute: Makes activations be recomputed in backward, and says what to try first then; None if they are, or
            must not be.
        say: Shows a line.
    Raises:
        UserError: If nothing fits.
    """
    budget = first
    while not fits(budget):
        if budget > longest:
            smaller = max(longest, budget // 2)
            say(f"out of memory with {budget:,} tokens a micro-batch: trying {smaller:,}")
            budget = smaller
        elif recompute is not None:
            lacking, budget, recompute = budget, recompute(), None
            say(f"out of memory with {lacking:,} tokens a micro-batch: activations recomputed, trying {budget:,}")
        else:
            raise UserError(
                f"out of memory with {budget:,} tokens, the longest pair, in a micro-batch; lower data.max_length,"
                f" allow model.gradient_checkpointing, use more GPUs, or ZeRO-3"
            )
    return budget


def attempt(setup: Setup, policy: Policy, reference: Reference | None) -> None:
    """Forward and backward pass of the costliest micro-batch, without a trace and without collectives.

    What a loss needs beside sums of log-probs, whole distributions or certainties, is computed too.

    Args:
        setup: The run, with the budget to try.
        policy: Started.
        reference: Of the training pairs; None in the SFT stage.
    Raises:
        torch.OutOfMemoryError: If it does not fit.
    """
    loader, scorer = setup.loader(setup.train_pairs, policy.layout), policy.scorer
    batch = loader.build(costliest(loader, setup.heaviest_steps(policy.layout)), 0).to(setup.world.device)
    known = None if reference is None else reference(batch)
    with _embedded(scorer.model) as tokens:
        total = _total(policy, batch, known)
    learned: list[Tensor] = [p for p in scorer.parameters() if p.requires_grad]
    if tokens and setup.zero_stage == 2:
        # Every gradient is handed on as it comes, and that of the embedded tokens passes through all blocks.
        learned = [*tokens, *(w for w in (scorer.head.weight,) if w.requires_grad)]
    torch.autograd.grad(total, learned, allow_unused=True)


@contextmanager
def _embedded(model: Any) -> Iterator[list[Tensor]]:
    """Collects the embedded tokens of the forward passes within it that learn; nothing where embeddings are frozen."""
    found: list[Tensor] = []
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = nn.Identity()  # which nobody calls
    with embeddings.register_forward_hook(
        lambda _, __, output: found.append(output) if output.requires_grad else None
    ):
        yield found


def _total(policy: Policy, batch: PackedBatch, known: PairLogps | None) -> Tensor:
    """Something whose gradient takes the memory of the loss's."""
    scorer = policy.scorer
    if known is None:
        return scorer(batch).sum()
    if policy.takes_loss_in_forward(batch, known):
        return scorer(batch, pair_losses=lambda chosen, rejected, pairs: chosen - rejected)[0]
    logps = pair_logps(scorer, batch, known.tokens, policy.certain)
    return logps.chosen.sum() + logps.rejected.sum() + (0 if logps.kls is None else logps.kls.sum())


def _owed(setup: Setup, policy: Policy) -> int:
    """Bytes of this rank that the first step adds to what is there before it."""
    optimizer = policy.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    return first_step_bytes(
        setup.zero, world_size=setup.world.world_size,
        width=setup.dtype.itemsize, trained=num_parameters(policy.scorer, trained=True),
        largest=max(p.numel() for p in policy.scorer.parameters() if p.requires_grad),
        states=0 if inner.state else STATES[setup.config.optim.name],
    )  # fmt: skip


def _fits(setup: Setup, policy: Policy, reference: Reference | None, budget: int, owed: int) -> bool:
    lacking, kept = False, None
    try:
        kept = torch.empty(owed, dtype=torch.uint8, device=setup.world.device)
        attempt(replace(setup, token_budget=budget), policy, reference)
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        lacking = True
    del kept
    policy.scorer.router_loss = None  # it holds the graph of a pass that did not end
    if setup.world.device.type == "cuda":
        torch.cuda.empty_cache()
    return not any(gather(lacking))


def _room(setup: Setup, policy: Policy, owed: int) -> Room:
    """Of this rank."""
    scorer, layout = policy.scorer, policy.layout
    shape = shape_of(scorer.model.config, setup.dtype, trust_remote_code=setup.config.model.trust_remote_code)
    return Room(
        shape, setup.dtype, _free_memory(setup.world.device) - owed,
        setup.zero_stage, num_parameters(scorer, trained=True), setup.longest_row(layout), layout,
        setup.ranks_a_row, scorer.head.chunk_rows,
    )  # fmt: skip


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


@contextmanager
def fitted(
    setup: Setup, policy: Policy, reference: Reference | None, say: Callable[[str], None]
) -> Iterator[Setup]:
    """A stage with micro-batches that fit; where memory runs out all the same, its next start has smaller ones.

    Args:
        setup, policy, reference, say: As of `fit_budget`; the run directory exists.
    Returns:
        The setup with its budgets, for the block that is the stage.
    """
    path = setup.run / ("sft_micro_batches.json" if reference is None else "micro_batches.json")
    found = fit_budget(setup, policy, reference, say, path)
    with lowered(found, policy, path):
        yield found


def fit_budget(
    setup: Setup,
    policy: Policy,
    reference: Reference | None,
    say: Callable[[str], None],
    path: Path | None = None,
) -> Setup:
    """Find the budget of a stage, or take up what the run has found before, and compile blocks; collective.

    Args:
        setup: The run.
        policy: Started; may be made to recompute activations.
        reference: Of the training pairs; None in the SFT stage.
        say: Shows a line.
        path: Where the budget is kept; None has nothing read or written.
    Returns:
        The setup with its budgets, where memory can run out; else as it was.
    Raises:
        UserError: If not even the longest pair fits.
    """
    world, model = setup.world, policy.scorer.model
    if not can_run_out(world.device):
        _compile(setup, policy, say)
        return setup
    key = _key(setup, policy.layout)
    found = None if path is None else only_main(world, lambda: read_budget(path))
    if found is None or found.found_for != key:
        found = _find(setup, policy, reference, say, key)
        if path is not None:
            only_main(world, partial(write_budget, path, found))
    else:
        if found.recomputed and not blocks.recomputes_activations(model):
            blocks.checkpoint_activations(model)
        _compile(setup, policy, say)
    again, where = ", activations recomputed" if found.recomputed else "", "" if path is None else f" ({path.name})"
    say(f"micro-batches: at most {found.tokens:,} tokens{again}{where}")
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)  # perf/peak_memory_gib is that of training
    return replace(setup, token_budget=found.tokens, evaluation_budget=found.evaluation)


def _key(setup: Setup, layout: Layout) -> dict[str, Any]:
    """What a budget was found for; where it differs another is looked for."""
    model, train, device = setup.config.model, setup.config.train, setup.world.device
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return {
        "asked": train.tokens_per_micro_batch, "pairs": train.micro_batch_size, "static_shapes": train.static_shapes,
        "layout": layout, "world_size": setup.world.world_size, "ranks_a_row": setup.ranks_a_row,
        "checkpointing": model.gradient_checkpointing, "attention": model.attention, "compile": model.compile,
        "loss_in_forward": model.loss_in_forward, "vocabulary_multiple": model.vocabulary_multiple,
        "zero": setup.zero, "gpu_gib": min(gather(total)) // GIB,
    }  # fmt: skip


def _find(
    setup: Setup, policy: Policy, reference: Reference | None, say: Callable[[str], None], key: dict[str, Any]
) -> Budget:
    """The budget; the policy does what was found."""
    model, owed, asked = policy.scorer.model, _owed(setup, policy), setup.config.train.tokens_per_micro_batch
    room = _room(setup, policy, owed)

    def first() -> int:
        if asked != "auto":
            return max(asked, room.longest)
        return min(gather(room.budget(recomputed=blocks.recomputes_activations(model))))

    def recompute() -> int:
        blocks.checkpoint_activations(model)
        return first()

    may = may_recompute(setup, model)
    if may and any(gather(room.asks_for_recomputation(wanted_tokens(setup, policy.layout)))):
        blocks.checkpoint_activations(model)
        may = False
    _compile(setup, policy, say)
    searched = budget = first()
    if room.is_tried:
        fits = partial(_fits, setup, policy, reference, owed=owed)
        searched = choose(budget, room.longest, fits, recompute if may else None, say)
        if may and blocks.recomputes_activations(model):
            _compile(setup, policy, say)  # says that it no longer is
        # More was not tried; without gradients, whose activations are what takes memory, it need not be.
        budget = max(room.longest, min(searched, max(gather(largest(setup, policy.layout, searched)))))
    return Budget(budget, searched, blocks.recomputes_activations(model), key)


def _compile(setup: Setup, policy: Policy, say: Callable[[str], None]) -> None:
    if setup.config.model.compile:
        say(blocks.compile_where_it_helps(policy.scorer.model, padded=policy.layout.startswith("padded")))
