"""The training run: setup -> SFT -> DPO -> what it leaves behind.

A line of metrics.jsonl with `step: n` reports the forward passes made before the n-th update, so line 1 shows the
start. Evaluations follow the update they name; the one at the start is step 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo.audit import audit_run
from dpo.budget import fit_budget
from dpo.commandline import Command
from dpo.config import to_dict
from dpo.data.loader import whole_pass
from dpo.evaluate import ValidationShare, evaluate
from dpo.export import final_dtype, write_weights
from dpo.finish import card_of, closing, keep_evaluation, take_samples
from dpo.model import adapters
from dpo.model.load import fetch_weights
from dpo.model.reference import remembered
from dpo.objective.objective import Objective
from dpo.plan import show_plan
from dpo.policy import FrozenReference, Policy, start_models
from dpo.report.page import Refresher
from dpo.runtime import checkpoint, distributed
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime.checkpoint import TrainState
from dpo.runtime.schedule import learning_rate
from dpo.runtime.tracking import Recorder, Silent, Tracker, keep_lines
from dpo.setup import Setup, prepare
from dpo.sft import run_sft
from dpo.start import check_start
from dpo.step import meter_for, take_step
from dpo.sync import move_reference, restore_reference, save_reference


def _due(step: int, every: int | str, steps_per_epoch: int, total: int) -> bool:
    """Whether something that happens every `every` steps, or every epoch, is due after `step` steps."""
    return step == total or step % (steps_per_epoch if every == "epoch" else int(every)) == 0


def train(command: Command) -> None:
    """Run what a command line asks for, from the first line of data to the final folder; collective.

    Args:
        command: Parsed command line.
    Raises:
        UserError: The same line on every rank.
    """
    began = time.perf_counter()
    config = command.config
    world = distributed.start()
    checkpoint.check_run(config, world)
    setup = prepare(config, world, command.deepspeed_json, for_elsewhere=command.prepare_only)
    if command.prepare_only:
        _fetch(setup)
        show_plan(setup, command)
        return
    sft_is_done = distributed.only_main(world, lambda: (setup.run / "reference").is_dir())
    start = str(setup.run / "reference") if config.train.sft_epochs else config.model.policy
    assert start is not None
    if command.dry_run:
        # Not cached: a look at the plan should not score the whole data set.
        if setup.reference_mode == "cached":
            setup = replace(setup, config=replace(config, reference=replace(config.reference, mode="online")))
        policy, reference = start_models(setup, config.model.policy or start, lambda note: None)
        show_plan(setup, command, policy, reference)
        return
    if done := distributed.only_main(world, lambda: checkpoint.finished(setup.run, setup.total_steps)):
        if world.is_main:
            print(done, file=sys.stderr)
        return
    folder = checkpoint.newest(
        setup.run,
        config.train.resume,
        world,
        stage=deepspeed_engine.zero_stage(setup.engine_config),
        total_steps=setup.total_steps,
    )
    checkpoint.open_run(config, world)
    tracker = _tracker(setup)
    for note in _greeting(command) + list(setup.notes) + audit_run(setup):
        tracker.say(note)
    if config.train.sft_epochs and not sft_is_done:
        _keep(setup, lambda line: False)
        run_sft(setup, tracker)
    policy, reference = start_models(setup, start, tracker.say)
    state = _resume(setup, policy, reference, folder, tracker)
    state = _train_dpo(setup, policy, reference, state, tracker)
    write_weights(setup, policy, setup.run / "final", final_dtype(setup), card_of(setup))
    closing(setup, tracker, time.perf_counter() - began)
    tracker.close()


def _fetch(setup: Setup) -> None:
    """Download the weights of policy and reference."""
    model, other = setup.config.model, setup.config.reference.path
    for path, own in ((model.policy or "", model.revision), (other or "", None)):
        if path:
            base, revision = adapters.base_of(path, own)
            distributed.main_first(setup.world, partial(fetch_weights, base, revision=revision))


def _greeting(command: Command) -> list[str]:
    if not command.assumed_quickstart:
        return []
    return [
        f"neither --recipe nor model.policy nor data.train is given: running {command.recipe} (built-in data, built-in"
        f" tiny model, no network); for GPT-2 on Anthropic HH-RLHF: --recipe recipes/gpt2_hh.yaml"
    ]


def _tracker(setup: Setup) -> Tracker:
    config = setup.config
    if not setup.world.is_main:
        return Silent()
    return Recorder(setup.run, to_dict(config), config.log.backends)


def _keep(setup: Setup, keep: Callable[[dict[str, Any]], bool]) -> None:
    distributed.only_main(setup.world, lambda: keep_lines(setup.run, keep))


def _resume(
    setup: Setup, policy: Policy, reference: FrozenReference, folder: Path | None, tracker: Tracker
) -> TrainState:
    """Bring engine, a reference that moves, and metrics.jsonl to a checkpoint, if there is one."""
    state = checkpoint.load(policy.engine, folder, setup.world) if folder is not None else TrainState()
    if folder is not None:
        if setup.config.reference.sync_steps is not None:
            restore_reference(reference, folder)
        tracker.say(f"continuing from {folder} after step {state.step}")
    _keep(setup, lambda line: "sft_step" in line or (folder is not None and line["step"] <= state.step))
    return state


def _train_dpo(
    setup: Setup, policy: Policy, reference: FrozenReference, state: TrainState, tracker: Tracker
) -> TrainState:
    """The DPO stage from `state` to the last step."""
    setup = fit_budget(setup, policy, reference.train, tracker.say)
    config, world, total = setup.config, setup.world, setup.total_steps
    sync_steps = config.reference.sync_steps
    loss = Objective(config.loss, state.running)
    loader = setup.loader(setup.train_pairs, policy.layout)
    per_epoch = setup.epochs.steps_per_epoch
    validation: dict[str, ValidationShare] = {}
    if setup.validation_pairs is not None:
        every, lengths = setup.loader(setup.validation_pairs, policy.layout), setup.validation_pairs.lengths
        validation = {
            name: ValidationShare(whole_pass(every, ids), float(lengths[ids, 1].mean()))
            for name, ids in setup.data.validation_sets().items()
        }
    known_reference = remembered(reference.validation)
    report = Refresher(setup.run, tracker.say)

    def evaluate_after(step: int) -> None:
        if validation:
            metrics, pairs = evaluate(policy, known_reference, validation, loss, world)
            tracker.record({"step": step, "epoch": step / per_epoch} | metrics)
            tracker.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if "logps" not in k))
            keep_evaluation(setup, step, pairs, report)

    if state.step == 0:
        check_start(setup, policy, reference, loss, loader[0], tracker)
        evaluate_after(0)
    meter = meter_for(setup, policy)
    meter.take_up(state.unlogged, world.is_main)
    for work in loader.steps(state.step, total):
        lr = learning_rate(
            work.step, total=total, peak=config.optim.lr, schedule=config.optim.schedule,
            warmup_steps=config.optim.warmup_steps,
        )
        take_step(setup, policy, reference, loss, work, lr, meter)
        step = work.step + 1
        if sync_steps is not None and step % sync_steps == 0:
            move_reference(reference, policy, config.reference.sync_alpha)
            known_reference = remembered(reference.validation)
        state = TrainState(step, state.num_tokens + work.num_tokens, running=loss.running)
        if step % config.log.every == 0 or step == total:
            values = meter.line(world.device) | {"learning_rate": lr, "num_tokens": state.num_tokens}
            tracker.record({"step": step, "epoch": step / per_epoch} | values)
            note = (
                f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.3f}"
                f"  margin {values['rewards/margins']:.3f}  {values['perf/pairs_per_second']:.1f} pairs/s"
            )
            tracker.progress("DPO", step, total, note)
        if _due(step, config.train.eval_every, per_epoch, total):
            evaluate_after(step)
        if config.log.samples and _due(step, _sample_every(config.log.sample_every, total), per_epoch, total):
            take_samples(setup, policy, reference, step, tracker)
        if _due(step, config.train.save_every, per_epoch, total):
            whole = replace(state, unlogged=meter.carried())
            more = None if sync_steps is None else partial(save_reference, reference, world)
            checkpoint.save(policy.engine, setup.run, whole, world, config.train.keep_checkpoints, more)
    return state


def _sample_every(every: int | str, total: int) -> int | str:
    return total if every == "end" else every
