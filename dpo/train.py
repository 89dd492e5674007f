"""The training run: setup -> SFT -> DPO -> what it leaves behind."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from dpo.audit import audit_run
from dpo.commandline import Command
from dpo.config import to_dict
from dpo.errors import UserError, one_line
from dpo.memory.budget import fit_budget, fitted
from dpo.model import adapters
from dpo.model.load import fetch_weights
from dpo.model.reference import nothing
from dpo.plan import show_plan
from dpo.preference import run_dpo
from dpo.run.inputs import check_inputs
from dpo.run.prepare import prepare
from dpo.run.setup import Setup
from dpo.runtime import checkpoint, distributed, heartbeat, preemption, run_directory
from dpo.runtime.distributed import World
from dpo.runtime.folders import drop_leftovers
from dpo.runtime.status import State, write_status
from dpo.runtime.tracking import Recorder, Silent, Tracker, keep_lines
from dpo.sft import drop_checkpoints, run_sft
from dpo.training.export import dtype_of, write_weights
from dpo.training.finish import card_of, closing
from dpo.training.frozen import FrozenReference, start_models
from dpo.training.load_models import read_whole
from dpo.training.policy import Policy, start_policy
from dpo.training.sync import restore_reference
from dpo.types import TrainState

FULL = (errno.ENOSPC, errno.EDQUOT)


def train(command: Command) -> None:
    """Run what a command line asks for, from the first line of data to the final folder; collective.

    Args:
        command: Parsed command line.
    Raises:
        UserError: The same line on every rank.
    """
    train = command.config.train
    world = distributed.start(deterministic=train.deterministic)
    with heartbeat.watching(world, Path(train.output_dir), train.hang_timeout):
        _run(command, world)


def _run(command: Command, world: World) -> None:
    """Everything that the ranks do together."""
    began = time.perf_counter()
    config = command.config
    distributed.only_main(world, lambda: run_directory.check_run(config))
    setup = prepare(config, world, command.deepspeed_json, for_elsewhere=command.prepare_only)
    if command.prepare_only:
        _fetch(setup)
        show_plan(setup, command)
        return
    if command.dry_run:
        _show_dry_run(setup, command)
        return
    done = distributed.only_main(world, lambda: run_directory.finished(setup.run, setup.total_steps))
    if done and config.train.resume == "auto":
        if world.is_main:
            print(done, file=sys.stderr)
        return
    with run_directory.opened(config, world):
        folder, sft_is_done, notes = _found(setup)
        with _told(setup), distributed.together(lambda: _tracker(setup)) as tracker:
            distributed.only_main(world, lambda: check_inputs(setup))
            for note in _greeting(command) + list(setup.notes) + notes + audit_run(setup):
                tracker.say(note)
            with preemption.listening(), heartbeat.explaining():
                if config.train.sft_epochs and not sft_is_done:
                    run_sft(setup, tracker)
                start = str(setup.run / "reference") if config.train.sft_epochs else str(config.model.policy)
                heartbeat.at("loading the models")
                policy, reference = start_models(setup, start, tracker.say)
                state = _resume(setup, policy, reference, folder, tracker)
                with fitted(setup, policy, reference.of_training, tracker.say) as fitted_setup:
                    run_dpo(fitted_setup, policy, reference, state, tracker)
            heartbeat.at("writing final/")
            write_weights(setup, policy, setup.run / "final", dtype_of(config, setup.start_dtype), card_of(setup))
            distributed.only_main(world, lambda: closing(setup, tracker, time.perf_counter() - began))


def _found(setup: Setup) -> tuple[Path | None, bool, list[str]]:
    """What there is to go on from, once no other process writes the run; what is left over is removed; collective.

    Returns:
        The checkpoint of DPO; whether SFT is done; lines for the log.
    Raises:
        UserError: If train.resume names no checkpoint, none fits, or those that there were are gone.
    """
    run, world = setup.run, setup.world
    sft_is_done = distributed.only_main(world, lambda: (run / "reference").is_dir())
    folder, damaged = checkpoint.newest(
        run, setup.config.train.resume, world, stage=setup.zero_stage, precision=setup.precision,
        total_steps=setup.total_steps,
    )  # fmt: skip

    def tidy() -> None:
        if folder is None:
            run_directory.check_kept(run)
        drop_leftovers(run / "checkpoints")
        if sft_is_done:
            drop_checkpoints(run)

    distributed.only_main(world, tidy)
    return folder, sft_is_done, damaged


def _show_dry_run(setup: Setup, command: Command) -> None:
    """Do all that comes before the first step of DPO, and show the plan."""
    config = setup.config
    assert config.model.policy is not None
    if setup.reference_mode == "cached":  # a look at the plan should not score the whole data set
        policy = start_policy(setup, config.model.policy)
        reference = FrozenReference(nothing, nothing, setup.dtype, None)
    else:
        still = replace(config, reference=replace(config.reference, sync_steps=None))
        policy, reference = start_models(replace(setup, config=still), config.model.policy, lambda note: None)
    say = partial(print, file=sys.stderr) if setup.world.is_main else lambda line: None
    setup = fit_budget(setup, policy, reference.of_training, say)
    show_plan(setup, command, policy, reference)


@contextmanager
def _told(setup: Setup) -> Iterator[None]:
    """Keep status.json true, whatever ends the block."""

    def write(state: State, reason: str = "") -> None:
        with suppress(OSError):  # a disk that is full has the last word nowhere but on the console
            write_status(setup.run, state, reason=one_line(reason, 1000), place=heartbeat.place())

    def tell(state: State, reason: str = "") -> None:
        if setup.world.is_main:
            write(state, reason)

    tell("running")
    distributed.last_words.append(partial(write, "failed"))
    try:
        yield
    except (preemption.Preempted, KeyboardInterrupt) as stop:
        tell("preempted", str(stop) or "interrupted")
        raise
    except BaseException as error:
        tell("failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        if isinstance(error, OSError) and error.errno in FULL:
            full = f"{setup.run}: {error.strerror}; the checkpoints are whole; make room and start again"
            distributed.give_up(setup.world, full)
        raise
    finally:
        distributed.last_words.clear()


def _fetch(setup: Setup) -> None:
    """Download the weights of policy and reference."""
    config = setup.config
    for name, path in (("model.policy", config.model.policy), ("reference.path", config.reference.path)):
        if path is not None:
            base, revision = adapters.base_of(path, config.revision_of(path, is_policy=name == "model.policy"))
            distributed.together(partial(fetch_weights, base, revision=revision, name=name))


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


def _resume(
    setup: Setup, policy: Policy, reference: FrozenReference, folder: Path | None, tracker: Tracker
) -> TrainState:
    """Bring engine, a reference that moves, and metrics.jsonl to a checkpoint, if there is one."""
    state = TrainState()
    if folder is not None:
        state = checkpoint.load(policy.engine, folder, setup.world, partial(read_whole, setup))
        if setup.config.reference.sync_steps is not None:
            restore_reference(reference, folder)
        tracker.say(f"continuing from {folder} after step {state.step}")
    last = -1 if folder is None else state.step
    distributed.only_main(setup.world, lambda: run_directory.reopen(setup.run, state.step))
    keep = partial(keep_lines, setup.run, lambda line: "sft_step" in line or line["step"] <= last)
    distributed.only_main(setup.world, keep)
    return state
