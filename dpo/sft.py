"""Supervised fine-tuning on chosen completions before DPO; its result is frozen as the reference.

The loss of a step is the mean negative log-prob of the chosen completion tokens of its global batch, in nats per token;
that of validation is the same over the chosen completions of all validation pairs.
The stage writes `reference/` in the run directory. A run killed before that folder is whole continues the stage from
its newest checkpoint; one killed after never repeats it, and never takes later weights for the reference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dpo.data.loader import StepBatches, whole_pass
from dpo.data.planner import Layout, num_tokens
from dpo.memory.budget import fitted
from dpo.run.setup import Setup
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime import heartbeat, preemption
from dpo.runtime.checkpoint import checkpoints, load, newest, step_folder
from dpo.runtime.distributed import only_main, sum_over_ranks
from dpo.runtime.folders import drop
from dpo.runtime.schedule import due, learning_rate
from dpo.runtime.status import write_status
from dpo.runtime.tracking import Tracker, keep_lines, read_lines
from dpo.training.export import save_checkpoint, write_weights
from dpo.training.load_models import read_whole
from dpo.training.nonfinite import Nonfinite, spoil
from dpo.training.policy import Policy, start_policy
from dpo.types import PackedBatch, TrainState


def run_sft(setup: Setup, tracker: Tracker) -> None:
    """Train on chosen completions and write the result as `reference/`; collective.

    Args:
        setup: The run; train.sft_epochs >= 1.
        tracker: For progress and metrics: `sft_step`, `sft_epoch`, `sft_loss`, of validation `eval_sft_loss`, and
            `grad_norm`, `learning_rate`, `num_tokens`.
    Raises:
        Preempted: On every rank, if any was asked to stop; the stage is checkpointed.
        UserError: If a loss or gradient is not finite and the run is not to go on.
    """
    config = setup.config
    assert config.model.policy is not None
    heartbeat.at("loading the model of SFT")
    policy = start_policy(setup, config.model.policy, for_sft=True)
    for note in policy.notes:
        tracker.say(note)
    derived = "" if config.optim.sft_lr is not None else ", 20 x optim.lr (optim.sft_lr)"
    tracker.say(f"SFT: epochs {config.train.sft_epochs}, learning rate {config.optim.peak_sft_lr:g}{derived}")
    total = config.train.sft_epochs * setup.epochs.steps_per_epoch
    state = _resume(setup, policy, total, tracker)
    with fitted(setup, policy, None, tracker.say) as fitted_setup:
        _train(fitted_setup, policy, state, total, tracker)
    # In the dtype it was trained in: the policy and the reference of DPO are read back from here.
    write_weights(setup, policy, setup.run / "reference", setup.dtype, card=None)
    only_main(setup.world, lambda: drop_checkpoints(setup.run))
    deepspeed_engine.stop(policy.engine)


def drop_checkpoints(run: Path) -> None:
    """Remove the checkpoints of the stage, which is done: `reference/` stands for it."""
    for folder in checkpoints(run, "sft"):
        drop(folder)


def _resume(setup: Setup, policy: Policy, total: int, tracker: Tracker) -> TrainState:
    """Bring the engine to the stage's newest checkpoint, and metrics.jsonl with it."""
    folder, damaged = newest(
        setup.run, "auto", setup.world, stage=setup.zero_stage, precision=setup.precision, total_steps=total, kind="sft"
    )
    for note in damaged:
        tracker.say(note)
    state = TrainState()
    if folder is not None:
        state = load(policy.engine, folder, setup.world, partial(read_whole, setup))
        tracker.say(f"continuing SFT from {folder} after step {state.step}")
    only_main(setup.world, lambda: keep_lines(setup.run, lambda line: line.get("sft_step", total + 1) <= state.step))
    return state


def _train(setup: Setup, policy: Policy, state: TrainState, total: int, tracker: Tracker) -> None:
    sums = torch.zeros(2, dtype=torch.float64, device=setup.world.device)
    if setup.world.is_main and state.unlogged:
        sums += sums.new_tensor(state.unlogged)
    nonfinite = Nonfinite(setup, "sft_step", tracker.say, state.skipped)
    stage = _Stage(setup, policy, tracker, nonfinite, total, _held_out(setup, policy.layout), sums)
    heartbeat.at_first_step()
    try:
        if not only_main(setup.world, lambda: _is_evaluated(setup.run, state.step)):
            stage.evaluate(state.step)
        for work in setup.loader(setup.train_pairs, policy.layout).steps(state.step, total):
            state, stop = stage.step(work, state)
            preemption.stop_if(stop)
            stage.evaluate(state.step)
            if stage.is_due(state.step, setup.config.train.save_every) and state.step < total:
                stage.save(state)
            heartbeat.at(f"waiting for the rows of SFT step {state.step + 1}", in_step=True)
    except preemption.Preempted:
        here = setup.run / "checkpoints" / step_folder(state.step, "sft")
        if not only_main(setup.world, lambda: state.step == 0 or here.is_dir()):
            stage.save(state)
        raise
    heartbeat.at("writing the result of SFT")


@dataclass
class _Stage:
    """What is carried from step to step.

    Attributes:
        total: Steps of the stage.
        held_out: This rank's micro-batches of the validation pairs' chosen completions.
        sums: (2,) fp64 on the device: negative log-probs and tokens since the last line of metrics.jsonl.
        steps, seconds: Since then, waiting for batches among it, evaluations not.
    """

    setup: Setup
    policy: Policy
    tracker: Tracker
    nonfinite: Nonfinite
    total: int
    held_out: list[PackedBatch]
    sums: torch.Tensor
    steps: int = 0
    seconds: float = 0.0

    def is_due(self, step: int, every: int | str) -> bool:
        return due(step, every, self.setup.epochs.steps_per_epoch)

    def step(self, work: StepBatches, state: TrainState) -> tuple[TrainState, bool]:
        """One optimizer step, and its line of metrics.jsonl where that is due.

        Returns:
            The state after it; whether any rank was asked to stop.
        """
        setup, optim, started = self.setup, self.setup.config.optim, time.perf_counter()
        lr = learning_rate(
            work.step, total=self.total, peak=optim.peak_sft_lr, schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
        )  # fmt: skip
        grad_norm, stop = _step(self.policy, work, lr, self.sums, self.nonfinite)
        heartbeat.at(f"after SFT step {work.step + 1}")
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - started + work.waited
        tokens = num_tokens(setup.train_pairs.lengths[setup.epochs.batch(work.step)], "chosen")
        state = TrainState(work.step + 1, state.num_tokens + int(tokens.sum()), skipped=self.nonfinite.count)
        if state.step % setup.config.log.every == 0 or state.step == self.total:
            self.record(state, grad_norm, lr)
        return state, stop

    def record(self, state: TrainState, grad_norm: float | None, lr: float) -> None:
        """A line of metrics.jsonl and the progress bar."""
        loss, step = _per_token(self.sums), state.step
        line = {
            "sft_step": step,
            "sft_epoch": step / self.setup.epochs.steps_per_epoch,
            "sft_loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "num_tokens": state.num_tokens,
        }
        self.tracker.record(line | self.nonfinite.metrics)
        self.tracker.progress("SFT", step, self.total, f"loss {loss:.4f}  {self.steps / self.seconds:.1f} steps/s")
        self.sums.zero_()
        self.steps, self.seconds = 0, 0.0

    def evaluate(self, step: int) -> None:
        """Evaluate if it is time."""
        if not self.held_out or not (step == self.total or self.is_due(step, self.setup.config.train.eval_every)):
            return
        heartbeat.at(f"in the evaluation after SFT step {step}")
        loss = _loss_of(self.policy, self.held_out, self.sums.device)
        epoch = step / self.setup.epochs.steps_per_epoch
        self.nonfinite.look_at(step, loss)
        self.tracker.record({"sft_step": step, "sft_epoch": epoch, "eval_sft_loss": loss})
        self.tracker.say(f"SFT step {step}: eval_sft_loss {loss:.4f}")

    def save(self, state: TrainState) -> None:
        """A checkpoint; status.json says so."""
        heartbeat.at(f"writing the checkpoint of SFT step {state.step}")
        unlogged = tuple(sum_over_ranks(self.sums.clone()).tolist())
        save_checkpoint(self.setup, self.policy, replace(state, unlogged=unlogged), kind="sft")
        if self.setup.world.is_main:
            write_status(self.setup.run, "running", place=heartbeat.place())


def _is_evaluated(run: Path, step: int) -> bool:
    return any(line.get("sft_step") == step and "eval_sft_loss" in line for line in read_lines(run))


def _held_out(setup: Setup, layout: Layout) -> list[PackedBatch]:
    """This rank's micro-batches of the validation pairs' chosen completions."""
    pairs = setup.validation_pairs
    return [] if pairs is None else whole_pass(setup.loader(pairs, layout), range(len(pairs)))


@torch.no_grad()
def _loss_of(policy: Policy, batches: Sequence[PackedBatch], device: torch.device) -> float:
    """Mean negative log-prob of the target tokens of all ranks' batches, nats a token; collective.

    Raises:
        Preempted: On every rank, if any was asked to stop.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        preemption.check(device)
        sums[0] -= policy.score(batch.to(device)).sum()
        sums[1] += len(batch.target_ids)
    return _per_token(sums)


def _per_token(sums: torch.Tensor) -> float:
    """The mean of all ranks' (2,) sums: negative log-probs over tokens, nats a token; NaN of none; collective."""
    nll, tokens = sum_over_ranks(sums).tolist()
    return nll / tokens if tokens else math.nan


def _step(
    policy: Policy, work: StepBatches, lr: float, sums: torch.Tensor, nonfinite: Nonfinite
) -> tuple[float | None, bool]:
    """One optimizer step; collective.

    Args:
        policy: The model.
        work: This rank's micro-batches.
        lr: Learning rate of the step.
        sums: (2,) fp64 on the device: negative log-probs and tokens, to which the step's are added.
        nonfinite: What happens at a loss or gradient that is not finite.
    Returns:
        Gradient norm, None where no step was taken; whether any rank was asked to stop after this step.
    """
    device, step, before, losses = sums.device, work.step + 1, sums.clone(), []
    for index, batch in enumerate(work.batches):
        heartbeat.at(f"in SFT step {step}, micro-batch {index + 1}", in_step=True)
        logps = policy.score(batch.to(device))
        nll = -logps.sum()
        scale = nonfinite.setup.world.world_size / work.num_target_tokens
        loss = nll * scale + policy.router_loss(len(batch.target_ids) * scale)
        losses.append(logps.detach())
        deepspeed_engine.backward(policy.engine, spoil(loss, losses[-1]), index == len(work.batches) - 1)
        sums[0] += nll.detach()
        sums[1] += len(batch.target_ids)  # not the step's: ranks that compute a row together all add its nll
    grad_norm, counts, stop = nonfinite.step(policy.engine, lr, work, losses)
    if not counts:
        sums.copy_(before)
    return grad_norm, stop
