"""What a run will do, before it does it: steps, micro-batches, memory.

On the ranks that will do it (--dry_run, --prepare_only), or ahead of them (python -m dpo plan).
"""

from __future__ import annotations

import sys
import time

import torch

from dpo.commandline import Command
from dpo.data.planner import num_tokens
from dpo.estimate import STATES, memory
from dpo.memory.room import costliest
from dpo.model.shape import shape_of
from dpo.objective.objective import Objective
from dpo.planning.forecast import Rows, forecast, prepare_for
from dpo.run.setup import LOOKED_AT, Setup
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.console import console_on, say, show_table
from dpo.runtime.weights import num_parameters
from dpo.training.context import contexts_of, look_ahead
from dpo.training.frozen import FrozenReference
from dpo.training.policy import Policy
from dpo.training.step import losses_of


def _lines(setup: Setup, command: Command) -> Rows:
    config, lengths = setup.config, setup.train_pairs.lengths[setup.epochs.order(0)]
    layout = config.train.layout
    useful, stored = (int(num_tokens(lengths, name).sum()) for name in ("packed", layout))
    validation = 0 if setup.validation_pairs is None else len(setup.validation_pairs)
    return [
        ("policy", str(config.model.policy)),
        ("pairs: training / validation", f"{len(lengths):,} / {validation:,}"),
        ("tokens a pair: prompt, chosen, rejected", ", ".join(f"{x:.0f}" for x in lengths.mean(axis=0))),
        (f"tokens computed in layout {layout}", f"{stored:,} of {useful:,} useful ones ({stored / useful:.2f}x)"),
        ("longest pair, tokens", f"{int(num_tokens(lengths, layout).max()):,}"),
        ("ranks x pairs a step", f"{setup.world.world_size} x {config.train.global_batch_size}"),
        ("SFT steps before", f"{config.train.sft_epochs * setup.epochs.steps_per_epoch:,}"),
        ("optimizer steps", f"{setup.total_steps:,} ({setup.epochs.steps_per_epoch:,} an epoch)"),
        ("precision", setup.precision),
        ("ZeRO stage", str(setup.zero_stage)),
        ("recipe", command.recipe or "none (defaults)"),
    ]


def _try_costliest(setup: Setup, policy: Policy, reference: FrozenReference) -> Rows:
    """One forward and backward pass of the costliest micro-batch; its gradients are never used."""
    loader, epochs = setup.loader(setup.train_pairs, policy.layout), setup.epochs
    looked_at = min(epochs.steps_per_epoch, LOOKED_AT)
    count = sum(len(loader.share_of(epochs.batch(step))) for step in range(looked_at))
    batch = loader.build(costliest(loader, setup.heaviest_steps(policy.layout)), 0)
    on_device = batch.to(setup.world.device)
    loss, device = Objective(setup.config.loss), setup.world.device
    chosen_length = float(setup.train_pairs.targets[:, 0].mean())
    _wait_for(device)
    started = time.perf_counter()
    known = look_ahead(policy, reference.of_training, [batch], device) if loss.couples else None
    (context,) = contexts_of(loss, [batch], known, chosen_length, setup.world, setup.ranks_a_row, is_step=False)
    reference_logps = reference.of_training(on_device)
    total, _, _ = losses_of(policy, on_device, reference_logps, loss, context)
    deepspeed_engine.backward(policy.engine, total, True)
    _wait_for(device)
    seconds = time.perf_counter() - started
    config = setup.config
    shape = shape_of(policy.scorer.model.config, setup.dtype, trust_remote_code=config.model.trust_remote_code)
    parts = memory(
        shape.parameters + (num_parameters(policy.scorer, trained=True) if setup.trains_adapters else 0),
        stage=setup.zero_stage,
        world_size=setup.world.world_size,
        half=setup.precision != "fp32",
        reference_bytes=reference.dtype.itemsize if setup.reference_mode == "online" else 0,
        trained=num_parameters(policy.scorer, trained=True),
        in_4_bits=shape.linear if config.model.load_in_4bit else 0,
        states=STATES[config.optim.name],
    )
    return [
        ("layout in use", policy.layout),
        ("micro-batches a step and rank", f"{count / looked_at:.1f}"),
        ("costliest micro-batch", f"{batch.input_ids.numel():,} tokens, {seconds:.2f} s forward and backward"),
        *((f"memory per GPU: {name}", f"{size:.3f} GiB") for name, size in parts.items()),
        ("memory per GPU: sum without activations", f"{sum(parts.values()):.3f} GiB"),
    ]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show_forecast(command: Command) -> None:
    """Print the plan of a run for hardware that is not here.

    Args:
        command: With a `Hardware` as its options.
    Raises:
        UserError: As the run itself would, before its first step.
    """
    setup = prepare_for(command)
    out = console_on(sys.stdout)
    for note in setup.notes:
        say(out, note)
    for title, rows in {"Run": _lines(setup, command), **forecast(setup, command.options)}.items():
        show_table(out, title, rows)


def show_plan(
    setup: Setup, command: Command, policy: Policy | None = None, reference: FrozenReference | None = None
) -> None:
    """Print the plan of a run on rank 0; with a policy, try its costliest micro-batch first. Collective.

    Args:
        setup: The run.
        command: Where it came from.
        policy, reference: Started models for --dry_run; None for --prepare_only.
    """
    rows = _lines(setup, command)
    if policy is not None and reference is not None:
        rows += _try_costliest(setup, policy, reference)
    if not setup.world.is_main:
        return
    out = console_on(sys.stdout)
    for note in setup.notes + tuple(policy.notes if policy else ()):
        say(out, note)
    show_table(out, "Plan" if policy else "Prepared", rows)
    if policy is None:
        say(
            out,
            "Weights, data and tokenised pairs are cached. On compute nodes without internet:\n"
            f"  export HF_HUB_OFFLINE=1 DPO_CACHE={setup.config.data.cache_folder}\n"
            "and the same HF_HOME as here.",
        )
