"""The DPO stage: a look at the start, then step after step, and what is due after each.

A line of metrics.jsonl with `step: n` reports the forward passes made before the n-th update, so line 1 shows the
start. Evaluations follow the update they name; the one at the start is step 0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dpo.data.loader import StepBatches, whole_pass
from dpo.evaluate import ValidationShare, evaluate
from dpo.memory.out_of_memory import explained
from dpo.objective.objective import Objective
from dpo.report.page import Refresher
from dpo.run.setup import Setup
from dpo.runtime import checkpoint, distributed, heartbeat, preemption
from dpo.runtime.schedule import due, learning_rate
from dpo.runtime.status import write_status
from dpo.runtime.tracking import Tracker, read_lines
from dpo.runtime.weights import mix_into
from dpo.training.export import save_checkpoint
from dpo.training.finish import keep_evaluation, take_samples
from dpo.training.frozen import FrozenReference
from dpo.training.meter import Meter, meter_for
from dpo.training.nonfinite import Nonfinite
from dpo.training.policy import Policy
from dpo.training.start import check_start
from dpo.training.step import take_step
from dpo.training.sync import save_reference
from dpo.types import TrainState


def run_dpo(
    setup: Setup, policy: Policy, reference: FrozenReference, state: TrainState, tracker: Tracker
) -> None:
    """Train from `state` to the last step; collective.

    Args:
        setup: The run.
        policy, reference: As they stand at `state`.
        state: Where to go on; the beginning, or a checkpoint.
        tracker: For progress, metrics and samples.
    Raises:
        Preempted: On every rank, if any was asked to stop; the run is checkpointed.
        UserError: If the start is not honest, or a loss or gradient is not finite and the run is not to go on.
    """
    world, loader = setup.world, setup.loader(setup.train_pairs, policy.layout)
    stage = Stage(
        setup, policy, reference, tracker, Objective(setup.config.loss, state.running), meter_for(setup, policy),
        Nonfinite(setup, "step", tracker.say, state.skipped), Refresher(setup.run, tracker.say),
        _validation(setup, policy),
    )  # fmt: skip
    stage.meter.take_up(state.unlogged, world.is_main)
    heartbeat.at_first_step()
    if state.step == 0:
        check_start(setup, policy, reference, stage.loss, loader[0], tracker)
        stage.evaluate(0)
    else:
        seen = distributed.only_main(world, lambda: _names_at(setup.run, state.step))
        if state.step == setup.total_steps and state.unlogged:  # there is no step left whose line would say it
            stage.record(state)
        stage.after(state, {*seen, "step"})
    try:
        for work in loader.steps(state.step, setup.total_steps):
            state, stop = stage.step(work, state)
            preemption.stop_if(stop)
            stage.after(state)
            heartbeat.at(f"waiting for the pairs of step {state.step + 1}", in_step=True)
    except preemption.Preempted:
        here = setup.run / "checkpoints" / checkpoint.step_folder(state.step)
        if not distributed.only_main(world, lambda: state.step == 0 or here.is_dir()):
            stage.save(state)
        raise


@dataclass(frozen=True)
class Stage:
    """What is carried from step to step.

    Attributes:
        validation: Name of every validation set -> this rank's share; empty where there is none.
    """

    setup: Setup
    policy: Policy
    reference: FrozenReference
    tracker: Tracker
    loss: Objective
    meter: Meter
    nonfinite: Nonfinite
    report: Refresher
    validation: dict[str, ValidationShare]

    def step(self, work: StepBatches, state: TrainState) -> tuple[TrainState, bool]:
        """One optimizer step, and its line of metrics.jsonl where that is due.

        Returns:
            The state after it; whether any rank was asked to stop.
        """
        setup, step, lr = self.setup, work.step + 1, self.learning_rate(work.step)
        stop = take_step(setup, self.policy, self.reference, self.loss, work, lr, self.meter, self.nonfinite)
        moves = setup.config.reference
        if moves.sync_steps is not None and step % moves.sync_steps == 0:
            assert self.reference.scorer is not None
            mix_into(self.reference.scorer, self.policy.scorer, moves.sync_alpha)
        tokens = state.num_tokens + work.num_tokens
        state = TrainState(step, tokens, running=self.loss.running, skipped=self.nonfinite.count)
        if step % setup.config.log.every == 0 or step == setup.total_steps:
            self.record(state)
        return state, stop

    def learning_rate(self, steps_done: int) -> float:
        """Of the step after `steps_done`."""
        optim = self.setup.config.optim
        return learning_rate(
            steps_done, total=self.setup.total_steps, peak=optim.lr, schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
        )  # fmt: skip

    def record(self, state: TrainState) -> None:
        """A line of metrics.jsonl and the progress bar."""
        step, epoch = state.step, state.step / self.setup.epochs.steps_per_epoch
        values = self.meter.line(self.setup.world.device) | {"learning_rate": self.learning_rate(step - 1)}
        values |= self.nonfinite.metrics
        self.tracker.record({"step": step, "epoch": epoch} | values | {"num_tokens": state.num_tokens})
        note = (
            f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.3f}"
            f"  margin {values['rewards/margins']:.3f}  {values['perf/pairs_per_second']:.1f} pairs/s"
        )
        self.tracker.progress("DPO", step, self.setup.total_steps, note)

    def after(self, state: TrainState, seen: Collection[str] = ()) -> None:
        """What is due after a step and not `seen` in its lines of metrics.jsonl yet; then its checkpoint."""
        step, train, log = state.step, self.setup.config.train, self.setup.config.log
        is_last, per_epoch = step == self.setup.total_steps, self.setup.epochs.steps_per_epoch
        if "eval_loss" not in seen and (is_last or due(step, train.eval_every, per_epoch)):
            self.evaluate(step)
        if "samples/kl" not in seen and log.samples and (is_last or due(step, log.sample_every, per_epoch)):
            with explained(self.setup.world, "lower log.samples or log.sample_tokens"):
                take_samples(self.setup, self.policy, self.reference, step, self.tracker)
        if not seen and (is_last or due(step, train.save_every, per_epoch)):
            self.save(state)

    def evaluate(self, step: int) -> None:
        """Score all validation pairs, where there are any."""
        if not self.validation:
            return
        heartbeat.at(f"in the evaluation after step {step}")
        metrics, pairs = evaluate(
            self.policy, self.reference.of_validation, self.validation, self.loss, self.setup.world
        )
        self.nonfinite.look_at(step, metrics["eval_loss"])
        keep_evaluation(self.setup, step, pairs)
        # Last: a start that finds this line does not evaluate again.
        self.tracker.record({"step": step, "epoch": step / self.setup.epochs.steps_per_epoch} | metrics)
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if "logps" not in k)
        self.tracker.say(f"step {step}: {shown}")
        if step > 0 and self.setup.world.is_main:
            self.report.refresh()

    def save(self, state: TrainState) -> None:
        """A checkpoint, the reference in it where it moves; status.json says so."""
        setup, world = self.setup, self.setup.world
        heartbeat.at(f"writing the checkpoint of step {state.step}")
        moves = setup.config.reference.sync_steps is not None
        state = replace(state, unlogged=self.meter.carried())
        more = partial(save_reference, self.reference, world) if moves else None
        save_checkpoint(setup, self.policy, state, more=more)
        if world.is_main:
            write_status(setup.run, "running", state.step, place=heartbeat.place())


def _validation(setup: Setup, policy: Policy) -> dict[str, ValidationShare]:
    """This rank's share of every validation set."""
    if setup.validation_pairs is None:
        return {}
    every, targets = setup.loader(setup.validation_pairs, policy.layout), setup.validation_pairs.targets
    return {
        name: ValidationShare(whole_pass(every, ids), float(targets[ids, 0].mean()))
        for name, ids in setup.data.validation_sets().items()
    }


def _names_at(run: Path, step: int) -> set[str]:
    """Names of everything that metrics.jsonl holds of a step."""
    return {name for line in read_lines(run) if line.get("step") == step for name in line}
