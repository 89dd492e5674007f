"""How many tokens a micro-batch may hold: what fits on every rank, found out before the first step.

    free memory  ->  are activations kept?
    free memory, or train.tokens_per_micro_batch  ->  the costliest micro-batch is run  ->  out of memory on any rank?
    half the budget, down to the longest pair  ->  activations recomputed, from the start again  ->  refused

The trial leaves nothing behind: gradients are returned and dropped, not accumulated, so that DeepSpeed never sees them
and no rank waits for another in a collective that one of them left. What was found is written to the run,

    micro_batches.json     asked for, world size, tokens a micro-batch, whether activations are recomputed
    sft_micro_batches.json the same of the SFT stage

and a run that goes on with as many ranks uses it again. Under ZeRO-3, whose forward pass is itself collective, and
where ranks compute a row together, nothing is tried: a rank that left it for lack of memory would leave the others
waiting. The budget is then what the free memory suggests, at most UNTRIED_TOKENS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpo.data.loader import Loader
from dpo.data.planner import Layout, num_tokens
from dpo.errors import UserError
from dpo.estimate import reduction_buckets
from dpo.model import load
from dpo.model.forward import pair_logps
from dpo.model.reference import Reference
from dpo.model.shape import shape_of
from dpo.policy import Policy
from dpo.room import LARGEST, Room, wanted_tokens
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.distributed import gather, only_main
from dpo.setup import LOOKED_AT, UNTRIED_TOKENS, Setup


def can_run_out(device: torch.device) -> bool:
    """Whether lack of memory shows as an error that can be caught; on a CPU the process is killed."""
    return device.type == "cuda"


def choose(
    first: int,
    longest: int,
    fits: Callable[[int], bool],
    recompute: Callable[[], None] | None,
    say: Callable[[str], None],
) -> int:
    """The largest budget on the ladder that fits.

    Args:
        first: Tokens to try first.
        longest: Tokens of the longest pair, the lowest rung.
        fits: Runs the costliest micro-batch of a budget; the same answer on every rank.
        recompute: Makes activations be recomputed in backward; None if they are, or must not be.
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
            say(f"out of memory with {budget:,} tokens a micro-batch: activations will be recomputed, trying {first:,}")
            recompute()
            recompute, budget = None, first
        else:
            raise UserError(
                f"out of memory with {budget:,} tokens, the longest pair, in a micro-batch; lower data.max_length,"
                f" allow model.gradient_checkpointing, use more GPUs, or ZeRO-3"
            )
    return budget


def costliest(loader: Loader) -> list[int]:
    """Pair ids of this rank's micro-batch with the most tokens, then the most completion tokens, of the first steps."""
    cost, completions = num_tokens(loader.dataset.lengths, loader.layout), loader.dataset.lengths[:, 1:].sum(axis=1)
    steps = range(min(loader.epochs.steps_per_epoch, LOOKED_AT))
    candidates = [ids for step in steps for ids in loader.share_of(loader.epochs.batch(step))]
    return max(candidates, key=lambda ids: (int(cost[ids].sum()), int(completions[ids].sum())))


def attempt(setup: Setup, policy: Policy, reference: Reference | None, layout: Layout) -> None:
    """Forward and backward pass of the costliest micro-batch, without a trace and without collectives.

    What a loss needs beside sums of log-probs, whole distributions or certainties, is computed too.

    Args:
        setup: The run, with the budget to try.
        policy: Started.
        reference: Of the training pairs; None in the SFT stage.
        layout: Of the micro-batches.
    Raises:
        torch.OutOfMemoryError: If it does not fit.
    """
    loader, scorer = setup.loader(setup.train_pairs, layout), policy.scorer
    batch = loader.build(costliest(loader), 0).to(setup.world.device)
    if reference is None:
        total = scorer(batch).sum()
    else:
        tokens, certain = reference(batch).tokens, scorer.certainty is not None
        if policy.in_forward and tokens is None and not certain and scorer.chunks(batch) is not None:
            total, _ = scorer(batch, None, False, lambda chosen, rejected, pairs: chosen - rejected)
        else:
            logps = pair_logps(scorer, batch, tokens, certain)
            total = logps.chosen.sum() + logps.rejected.sum() + (0 if logps.kls is None else logps.kls.sum())
    learned = [p for p in scorer.parameters() if p.requires_grad]
    # ZeRO-2 hands every gradient on as it comes. That of the first weight alone is a pass through all blocks too.
    is_whole = deepspeed_engine.zero_stage(setup.engine_config) < 2
    torch.autograd.grad(total, learned if is_whole else learned[:1], allow_unused=True)


def _owed(setup: Setup, policy: Policy, stage: int) -> int:
    """Bytes of a rank that a step adds to what is there before the first one: AdamW's states and gradients in fp32.

    Beside them the buckets that its first backward pass makes. With an offloaded optimizer the others are elsewhere.
    """
    zero, ranks, engine = setup.engine_config.get("zero_optimization", {}), setup.world.world_size, policy.engine
    buckets = reduction_buckets(zero, setup.dtype.itemsize)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return buckets
    trained, inner = _trained(policy), getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = 0 if inner.state else 2 if setup.config.optim.name == "adamw_8bit" else 8
    return buckets + trained * states // (ranks if stage >= 1 else 1) + 4 * trained // (ranks if stage >= 2 else 1)


def _trained(policy: Policy) -> int:
    """Parameters that learn."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in policy.scorer.parameters() if p.requires_grad)


def _fits(
    setup: Setup, policy: Policy, reference: Reference | None, layout: Layout, budget: int, owed: int
) -> bool:
    lacking, kept = False, None
    try:
        kept = torch.empty(owed, dtype=torch.uint8, device=setup.world.device)
        attempt(replace(setup, token_budget=budget), policy, reference, layout)
    except torch.OutOfMemoryError:
        lacking = True
    del kept
    policy.scorer.router_loss = None  # it holds the graph of a pass that did not end
    if setup.world.device.type == "cuda":
        torch.cuda.empty_cache()
    return not any(gather(lacking))


def _room(setup: Setup, policy: Policy, layout: Layout, longest: int, stage: int, owed: int) -> Room:
    """Of this rank."""
    scorer = policy.scorer
    shape = shape_of(scorer.model.config, setup.dtype, trust_remote_code=setup.config.model.trust_remote_code)
    free = _free_memory(setup.world.device) - owed
    return Room(shape, setup.dtype, free, stage, _trained(policy), longest, layout, scorer.head.chunk_rows)


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def fit_budget(
    setup: Setup,
    policy: Policy,
    reference: Reference | None,
    say: Callable[[str], None],
    *,
    layout: Layout,
    name: str = "micro_batches.json",
) -> Setup:
    """Find the budget of a stage, or take up what the run has found before; collective.

    Args:
        setup: The run; its directory exists.
        policy: Started; may be made to recompute activations.
        reference: Of the training pairs; None in the SFT stage.
        say: Shows a line.
        layout: Of the micro-batches.
        name: Of the file.
    Returns:
        The setup with its token_budget, where memory can run out; else as it was.
    Raises:
        UserError: If not even the longest pair fits.
    """
    config, world = setup.config, setup.world
    if not can_run_out(world.device):
        return setup
    stage, of_row = deepspeed_engine.zero_stage(setup.engine_config), config.train.sequence_parallel_size
    model, path = policy.scorer.model, setup.run / name
    is_tried = stage < 3 and of_row == 1
    key = {
        "asked": config.train.tokens_per_micro_batch, "world_size": world.world_size, "layout": layout,
        "ranks_a_row": of_row, "tried": is_tried,
    }  # fmt: skip
    found = only_main(world, lambda: _read(path))
    if found is None or {k: found.get(k) for k in key} != key:
        longest = math.ceil(num_tokens(setup.train_pairs.lengths, layout).max() / of_row)
        owed = _owed(setup, policy, stage)
        room = _room(setup, policy, layout, longest, stage, owed)
        may = config.model.gradient_checkpointing == "auto"
        if may and any(gather(room.asks_for_recomputation(wanted_tokens(setup, layout, longest)))):
            load.checkpoint_activations(model)
            may = False
        if config.train.tokens_per_micro_batch == "auto":
            most = LARGEST if is_tried else UNTRIED_TOKENS
            budget = min(gather(room.budget(recomputed=load.recomputes_activations(model), most=most)))
        else:
            budget = max(config.train.tokens_per_micro_batch, longest)
        if is_tried:
            fits = partial(_fits, setup, policy, reference, layout, owed=owed)
            budget = choose(budget, longest, fits, (lambda: load.checkpoint_activations(model)) if may else None, say)
        found = key | {"tokens": budget, "recomputed": load.recomputes_activations(model)}
        content = json.dumps(found)
        only_main(world, lambda: path.write_text(content, encoding="utf-8"))
    elif found["recomputed"] and not load.recomputes_activations(model):
        load.checkpoint_activations(model)
    again = ", activations recomputed" if found["recomputed"] else ""
    say(f"micro-batches: at most {found['tokens']:,} tokens{again} ({path.name})")
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)  # perf/peak_memory_gib is that of training
    return replace(setup, token_budget=int(found["tokens"]))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
